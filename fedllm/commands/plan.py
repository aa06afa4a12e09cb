"""Plan a private federation: epsilon, noise, what to expect, what would be better.

    fedllm plan --clients 20
    fedllm plan --run-config configs/private-100.toml --epsilon 2
    fedllm plan --clients 20 --rounds 100 --noise-multiplier 0.02
    fedllm plan --run-config configs/record-level.toml --records 486

No client is asked, and nothing is loaded but with `--probe`, which makes the noise of all
rounds, puts it into the fresh adapter of the real base model and scores that on the public
validation rows.
"""

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

from fedllm.commands.options import (
    add_clients,
    add_json,
    add_run_config,
    new_parser,
    read_settings,
    run_command,
    write_json,
)
from fedllm.config import RunConfig, parse_run_config
from fedllm.errors import ConfigError
from fedllm.planning.adapter_choice import choose_adapter, with_choice
from fedllm.planning.frontier import load_frontier
from fedllm.planning.noise import privacy_settings
from fedllm.planning.plan import count_trainable, plan_run
from fedllm.planning.record_noise import record_plan
from fedllm.privacy.accounting import calibrate, noise_to_signal
from fedllm.privacy.ledger import Ledger, PrivacySettings
from fedllm.privacy.wording import plain, strength

_DEFAULT_CLIENTS = 20
_EPSILONS = (1.0, 2.0, 4.0, 8.0)


def run(args: argparse.Namespace) -> int:
    """Print the plan, for a person or as JSON."""
    config = _config(args)
    if config.privacy.unit == "record":
        plan = _record_plan(config, args)
        lines = record_plan_lines(config, plan)
    else:
        plan, lines = _client_plan(config, args)
    if args.json:
        write_json(plan)
    else:
        sys.stdout.write("\n".join(lines) + "\n")
    return 0


def _client_plan(
    config: RunConfig, args: argparse.Namespace
) -> tuple[dict[str, Any], list[str]]:
    """Return the plan of client-level privacy, and its lines for a person.

    Raises:
        ConfigError: A flag's value cannot be used.
    """
    clients = config.strategy.num_clients or _DEFAULT_CLIENTS
    choice = choose_adapter(config, clients) if config.adapter.kind == "auto" else None
    if choice is not None:
        config = with_choice(config, choice)
    if args.trainable is not None and args.trainable < 1:
        raise ConfigError(f"--trainable: must be at least 1 (got {args.trainable})")
    d = args.trainable or count_trainable(config)
    settings = privacy_settings(config, clients, d)
    plan = plan_run(config, settings)
    plan["auto"] = choice.reason if choice is not None else None
    if args.plot:
        plan["plot"] = str(_write_plot(Path(args.plot), config.adapter.kind, plan))
    if args.probe:
        plan["noise_probe"] = _probe(config, settings)
    return plan, _lines(config, settings, plan)


def _config(args: argparse.Namespace) -> RunConfig:
    """Return the run config with what the flags say in its place."""
    settings = read_settings(args.run_config)
    flags = {
        "strategy.num-clients": args.clients,
        "num-server-rounds": args.rounds,
        "strategy.sampling": args.sampling,
        "strategy.fraction-train": args.fraction,
        "privacy.delta": args.delta,
        "adapter.kind": args.kind,
        "adapter.rank": args.rank,
        "adapter.target-modules": args.target_modules,
        "model.name": args.model,
    }
    if args.epsilon is not None:
        flags |= {"privacy.target-epsilon": args.epsilon}
        flags |= {"privacy.noise-multiplier": 0.0}
    if args.noise_multiplier is not None:
        flags |= {"privacy.noise-multiplier": args.noise_multiplier}
        flags |= {"privacy.target-epsilon": 0.0}
    settings.update({k: v for k, v in flags.items() if v is not None})
    config = parse_run_config(settings)
    if config.privacy.unit == "none":
        raise ConfigError("privacy.unit: there is nothing to plan (got 'none')")
    return config


def _record_plan(config: RunConfig, args: argparse.Namespace) -> dict[str, Any]:
    """Return the plan of one client with record-level privacy.

    Raises:
        ConfigError: The number of its records is missing, or a flag asks for what is
            not measured at record level.
    """
    if args.records is None:
        raise ConfigError(
            "--records: is needed under privacy.unit='record': how many rows the client "
            "has"
        )
    if args.probe or args.plot:
        raise ConfigError("--probe and --plot are for privacy.unit='client'")
    return record_plan(config, args.records)


def record_plan_lines(config: RunConfig, plan: dict[str, Any]) -> list[str]:
    """Return what a person reads of a client's plan."""
    z, batch = plan["noise_multiplier"], plan["expected_batch_size"]
    return [
        f"a client of {plan['num_records']:,} records: batches of about {batch} by "
        f"secret coins, {plan['steps_per_round']} steps in each of "
        f"{plan['num_rounds']} rounds",
        f"noise multiplier {z:.4g} <-> epsilon {plain(plan['epsilon'])} for adding or "
        f"removing one record, at delta {plan['delta']:.3g} (pld): protection is "
        f"{strength(plan['epsilon'])}",
        f"a step's mean gradient has noise of {z / batch:.3g} times "
        f"privacy.max-grad-norm {config.privacy.max_grad_norm:g} in each trained value",
    ]


def _lines(
    config: RunConfig, settings: PrivacySettings, plan: dict[str, Any]
) -> list[str]:
    """Return what a person reads."""
    adapter, z = config.adapter, settings.noise_multiplier
    cohort = {
        "all": "all",
        "fixed": f"{settings.num_sampled_clients:g}",
        "poisson": f"about {settings.num_sampled_clients:g}, by secret coins,",
    }[settings.sampling]
    lines = [
        f"{settings.population_size} clients, {cohort} in each of "
        f"{settings.planned_rounds} rounds; {adapter.kind} r={adapter.rank} on "
        f"{config.model.name}: {settings.num_trainable:,} trained values",
        f"noise multiplier {z:.4g} <-> epsilon {plain(plan['epsilon'])} zero-out, "
        f"{plain(plan['epsilon_replace_one'])} replace-one, at delta "
        f"{settings.delta:g} ({plan['accountant']}): protection is {plan['strength']}",
        f"noise to signal R = {plan['noise_to_signal']:.3g}; a round's mean update has "
        "noise of this norm for each clipping norm (no verdict alone)",
        *_expected_lines(plan),
    ]
    if plan["auto"]:
        lines.insert(1, f"adapter.kind auto: {adapter.kind}; {plan['auto']}")
    if plan["server_learning_rate_by_rule"] is not None:
        lines.append(
            "step by rule: strategy.server-learning-rate "
            f"{plan['server_learning_rate_by_rule']:.2g} on average over the rounds, at "
            f"clipping norm {settings.clipping_norm:g} (a rule for one local SGD step)"
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


def _expected_lines(plan: dict[str, Any]) -> list[str]:
    """Return what to expect, how sure that is, and what was measured to be better."""
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
            told = f"{ratio:.0f}" if ratio >= 10 else f"{ratio:.1f}"
            row += f"{f'{z:.3g} ({told})':>14}"
        lines.append(row)
    return lines


def _write_plot(path: Path, kind: str, plan: dict[str, Any]) -> Path:
    """Draw the measured losses over the number of clients; return the absolute path.

    Raises:
        ConfigError: The file cannot be written, or is of no known kind.
    """
    from fedllm.planning.plot import draw

    try:
        draw(path, kind, plan)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--plot: {path}: {error}") from None
    return path.absolute()


def _probe(config: RunConfig, settings: PrivacySettings) -> dict[str, float]:
    """Put the noise of all rounds into a fresh adapter of the real base model.

    Raises:
        ConfigError: There are no public validation rows to score it on.
    """
    from fedllm.adapters.peft_model import initial_arrays
    from fedllm.adapters.resolve import adapter_spec
    from fedllm.config import fedllm_home
    from fedllm.evaluation.public_rows import PublicRows
    from fedllm.models.loading import load_config, locate
    from fedllm.strategy.build import make_strategy
    from fedllm.strategy.client_level_dp import ClientLevelDP

    home = fedllm_home()
    location = locate(config.model.name, home)
    spec = adapter_spec(config.adapter, load_config(location), config.seed)
    public = PublicRows(config, home)
    arrays = initial_arrays(spec)
    before = public.validation_loss(arrays)
    if before is None:
        raise ConfigError(
            "--probe: there are no public validation rows; name some by "
            "data.public-validation"
        )
    clients = list(range(settings.population_size))
    with tempfile.TemporaryDirectory(prefix="fedllm-plan-") as folder:
        ledger = Ledger.create(Path(folder) / "privacy.json", settings)
        strategy = make_strategy(config, arrays, clients, ledger)
        assert isinstance(strategy, ClientLevelDP)
        after = public.validation_loss(strategy.noise_alone())
    assert after is not None
    return {"before": before, "noise_alone": after}


def parser() -> argparse.ArgumentParser:
    """Return the command's parser."""
    parser = new_parser("plan", __doc__)
    add_run_config(parser)
    add_clients(parser, f"clients of the run (default: {_DEFAULT_CLIENTS})")
    parser.add_argument("--rounds", type=int, help="rounds of the run")
    parser.add_argument("--epsilon", type=float, help="calibrate the noise to this")
    parser.add_argument("--noise-multiplier", type=float, help="epsilon falls out")
    parser.add_argument(
        "--records", type=int, help="of one client, under privacy.unit='record'"
    )
    parser.add_argument("--delta", type=float, help="delta of (epsilon, delta)")
    parser.add_argument("--sampling", help="all, fixed or poisson")
    parser.add_argument("--fraction", type=float, help="of the clients, in a round")
    parser.add_argument("--kind", help="kind of adapter")
    parser.add_argument("--rank", type=int, help="rank of the adapter")
    parser.add_argument("--target-modules", help="modules that the adapter changes")
    parser.add_argument("--model", help="base model")
    parser.add_argument("--trainable", type=int, help="trained values, if known")
    parser.add_argument(
        "--probe", action="store_true", help="try the noise on the real base model"
    )
    parser.add_argument("--plot", metavar="FILE", help="draw loss over clients")
    add_json(parser)
    return parser


def main(arguments: list[str] | None = None) -> None:
    """Run the command; an error is one line and exit status 1."""
    run_command(parser(), run, arguments)


if __name__ == "__main__":
    main()
