"""A plan as text for a person."""

from typing import Any

from fedllm.config import RunConfig
from fedllm.planning.frontier import load_frontier
from fedllm.privacy.accounting import calibrate, noise_to_signal
from fedllm.privacy.ledger import PrivacySettings
from fedllm.privacy.wording import delta_caution, plain, rounds_text, strength

_EPSILONS = (1.0, 2.0, 4.0, 8.0)


def plan_lines(
    config: RunConfig, settings: PrivacySettings, plan: dict[str, Any]
) -> list[str]:
    """Return the plan of client-level privacy as text.

    Args:
        config: The run config.
        settings: The noise and the federation that it is for.
        plan: The plan of `fedllm.planning.plan.plan_run`, with `auto`: the reason for the kind
            of adapter, or None; and `noise_probe` and `plot` if they were asked for.
    """
    adapter, z = config.adapter, settings.noise_multiplier
    cohort = {
        "all": "all",
        "fixed": f"{settings.num_sampled_clients:g}",
        "poisson": f"about {settings.num_sampled_clients:g}, by secret coins,",
    }[settings.sampling]
    lines = [
        f"{settings.population_size} clients, {cohort} in each of "
        f"{rounds_text(settings.planned_rounds)}; {adapter.kind} r={adapter.rank} on "
        f"{config.model.name}: {settings.num_trainable:,} trained values",
        f"noise multiplier {z:.4g} <-> epsilon {plain(plan['epsilon'])} zero-out, "
        f"{plain(plan['epsilon_replace_one'])} replace-one, at delta "
        f"{settings.delta:g} ({plan['accountant']}): protection is {plan['strength']}",
        f"noise to signal R = {plan['noise_to_signal']:.3g}; a round's mean update has "
        "noise of this norm for each clipping norm (no verdict alone)",
        *_expected_lines(plan),
    ]
    if settings.trustees:
        lines.insert(
            2,
            f"sealed: {settings.trustees} trustees, of whom {settings.colluding} may be the "
            f"server's; for who sees only the adapters epsilon is "
            f"{plain(plan['epsilon_adapters'])}; the noise of a round is "
            f"{settings.opened_noise / z:.2f} times that of a trusted server",
        )
    if plan["delta_caution"]:
        lines.insert(2, f"caution: {plan['delta_caution']}")
    if plan["auto"]:
        lines.insert(1, f"adapter.kind auto: {adapter.kind}; {plan['auto']}")
    if plan["server_learning_rate_by_rule"] is not None:
        lines.append(
            "step by rule: strategy.server-learning-rate "
            f"{plan['server_learning_rate_by_rule']:.2g} on average over the rounds, at "
            f"clipping norm {settings.clipping_norm:g} (a rule for {_rule_is_for(config)})"
        )
        by_rule = plan["expected_by_rule"]
        if by_rule["inside_what_was_measured"]:
            lines[-1] += f": expected test loss {_interval(by_rule)}"
    if "noise_probe" in plan:
        probe = plan["noise_probe"]
        lines.append(
            "noise alone moves the validation loss from "
            f"{probe['before']:.3f} to {probe['noise_alone']:.3f}"
        )
    if "plot" in plan:
        lines.append(f"plot: {plan['plot']}")
    return lines + _table(settings)


def _rule_is_for(config: RunConfig) -> str:
    """Return the local steps that the rule of the step is for."""
    if config.train.local_steps == 1:
        return "one local SGD step"
    return "about ten local SGD steps"


def _expected_lines(plan: dict[str, Any]) -> list[str]:
    """Return the expected loss, its nearest measured run, and better measured runs."""
    frontier, expected = load_frontier(), plan["expected"]
    on = f"on {frontier.model} with {frontier.data}"
    nearest = (
        f"  nearest measured: {expected['nearest_clients']} clients, epsilon "
        f"{expected['nearest_epsilon']:g}, {expected['nearest_settings']}: test loss "
        f"{expected['nearest_test_loss']:.2f} from {frontier.loss_before:.2f}"
    )
    if not expected["inside_what_was_measured"]:
        differences = ", ".join(expected["differences_from_nearest"])
        return [
            f"expected test loss: not measured {on} (in brackets the nearest measured): "
            + differences,
            nearest,
        ]
    share = expected["share_of_gain_without_privacy"]
    lines = [
        f"expected {on}: test loss {_interval(expected)} from "
        f"{frontier.loss_before:.2f}, {share:.0%} of the best gain without privacy",
        nearest,
    ]
    if plan["better"]:
        better = [f"{r['change']} ({r['test_loss']:.2f})" for r in plan["better"]]
        lines.append(
            "measured to be better, with rounds and steps of its own: "
            + "; ".join(better)
        )
    return lines


def _interval(expected: dict[str, Any]) -> str:
    """Return an expected test loss with its interval."""
    return (
        f"{expected['test_loss']:.2f} ({expected['test_loss_low']:.2f} to "
        f"{expected['test_loss_high']:.2f})"
    )


def _table(settings: PrivacySettings) -> list[str]:
    """Return the noise multiplier by rounds and epsilon, and R below it."""
    head = f"{'rounds':>8}" + "".join(f"{f'eps {e:g}':>14}" for e in _EPSILONS)
    lines = ["noise multiplier (R), all clients in each round:", head]
    for rounds in sorted({1, 3, 5, 10, 30, 100, settings.planned_rounds}):
        row = f"{rounds:>8}"
        for epsilon in _EPSILONS:
            z = calibrate(epsilon, rounds, settings.delta, "all", 1.0)
            size = settings.population_size
            ratio = noise_to_signal(z, settings.num_trainable, size)
            rounded = f"{ratio:.0f}" if ratio >= 10 else f"{ratio:.1f}"
            row += f"{f'{z:.3g} ({rounded})':>14}"
        lines.append(row)
    return lines


def record_plan_lines(config: RunConfig, plan: dict[str, Any]) -> list[str]:
    """Return the plan of a client, or of all under `joint`, with record level as text."""
    who = "all clients together, with" if config.is_joint else "a client of"
    z, batch = plan["noise_multiplier"], plan["expected_batch_size"]
    caution = delta_caution(plan["delta"], plan["num_records"])
    lines = [
        f"{who} {plan['num_records']:,} records: batches of about {batch} by "
        f"secret coins, {plan['steps_per_round']} steps in each of "
        f"{rounds_text(plan['num_rounds'])}",
        f"noise multiplier {z:.4g} <-> epsilon {plain(plan['epsilon'])} for adding or "
        f"removing one record, at delta {plan['delta']:.3g} ({plan['accountant']}): "
        "protection is "
        f"{strength(plan['epsilon'], plan['delta'], plan['num_records'])}",
        f"a step's mean gradient has noise of {plan.get('opened_noise', z) / batch:.3g} times "
        f"privacy.max-grad-norm {config.privacy.max_grad_norm:g} in each trained value",
    ]
    if "trustees" in plan:
        lines.insert(
            2,
            f"sealed: {plan['trustees']} trustees, of whom {plan['colluding_trustees']} may be "
            "the server's: that epsilon is against them; for whoever sees only the adapters it "
            f"is {plain(plan['epsilon_adapters'])}",
        )
    if caution:
        lines.insert(2, f"caution: {caution}")
    return lines
