"""The plan of a run with client-level privacy: noise, epsilon and the loss to expect."""

from dataclasses import replace
from typing import Any

from fedllm.adapters.resolve import resolve
from fedllm.config import RunConfig
from fedllm.models.layer_shapes import linear_shapes
from fedllm.planning.frontier import (
    Frontier,
    Measured,
    load_frontier,
    noise_level,
    step_by_rule,
)
from fedllm.planning.prediction import Prediction, predict
from fedllm.privacy.accounting import Epsilons, epsilons, noise_to_signal
from fedllm.privacy.ledger import PrivacySettings
from fedllm.privacy.wording import delta_caution, rounds_text, strength

# Test losses that differ by less are not worth a change.
_WORTH_A_CHANGE = 0.02

# Epsilons that differ by less than this share are the same.
_SAME_EPSILON = 0.01


def count_trainable(config: RunConfig) -> int:
    """Return the number of trained values d, without loading the model.

    Raises:
        ModelError: The layers of the model are not known to the planner.
        AdapterError: The adapter does not fit the model.
    """
    shapes = linear_shapes(config.model.name)
    # Every model that `linear_shapes` knows has its layers named as Llama's.
    return resolve(config.adapter, shapes, {}, "llama", config.seed).num_trainable


def plan_run(config: RunConfig, settings: PrivacySettings) -> dict[str, Any]:
    """Return all that is known before a run, as JSON values.

    Args:
        config: The run config, with a kind of adapter that is not `auto`.
        settings: The noise and the federation that it is for.
    """
    spent = _spent(settings, settings.noise_multiplier, settings.planned_rounds)
    frontier = load_frontier()
    prediction = predict(config, settings, frontier)
    rate = _server_learning_rate_by_rule(config, settings)
    by_rule = None
    if rate is not None:
        by_rule = predict(_with_rate(config, rate), settings, frontier)
    return {
        "num_clients": settings.population_size,
        "num_sampled_clients": settings.num_sampled_clients,
        "sampling": settings.sampling,
        "num_rounds": settings.planned_rounds,
        "num_trainable": settings.num_trainable,
        "noise_multiplier": settings.noise_multiplier,
        "epsilon": spent.zero_out,
        "epsilon_replace_one": spent.replace_one,
        "epsilon_adapters": _spent_on_adapters(settings),
        "trustees": settings.trustees,
        "colluding_trustees": settings.colluding,
        "delta": settings.delta,
        "accountant": spent.accountant,
        "strength": strength(spent.zero_out, settings.delta, settings.population_size),
        "delta_caution": delta_caution(settings.delta, settings.population_size),
        "noise_to_signal": noise_to_signal(
            settings.opened_noise,
            settings.num_trainable,
            settings.num_sampled_clients,
        ),
        "server_learning_rate_by_rule": rate,
        "expected": _expected(prediction, frontier),
        "expected_by_rule": _expected(by_rule, frontier) if by_rule else None,
        "better": _better(config, settings, prediction, frontier),
    }


def _spent(settings: PrivacySettings, noise_multiplier: float, rounds: int) -> Epsilons:
    """Return what a number of rounds spends at the run's delta."""
    return epsilons(
        noise_multiplier,
        rounds,
        settings.delta,
        settings.sampling,
        settings.num_sampled_clients / settings.population_size,
    )


def _spent_on_adapters(settings: PrivacySettings) -> float | None:
    """Return the epsilon of a sealed run for who sees only adapters; None: not sealed."""
    if not settings.trustees:
        return None
    return _spent(settings, settings.opened_noise, settings.planned_rounds).zero_out


def _server_learning_rate_by_rule(
    config: RunConfig, settings: PrivacySettings
) -> float | None:
    """Return the mean server learning rate by the rule, which is for `ffa-lora` only."""
    if config.adapter.kind != "ffa-lora":
        return None
    level = noise_level(
        settings.opened_noise,
        settings.planned_rounds,
        settings.num_sampled_clients,
    )
    rate = step_by_rule(level, config.train.local_steps) * 0.6 / settings.clipping_norm
    # Three digits of any size: a rate of 0 is none.
    return float(f"{rate:.3g}")


def _with_rate(config: RunConfig, rate: float) -> RunConfig:
    """Return a run config with one server learning rate for all rounds."""
    return replace(
        config,
        strategy=replace(
            config.strategy,
            server_learning_rate=rate,
            server_learning_rate_min=rate,
        ),
    )


def _expected(prediction: Prediction, frontier: Frontier) -> dict[str, Any]:
    """Return a prediction as JSON values; null for what was not measured."""
    interval, nearest = prediction.interval, prediction.nearest
    return {
        "test_loss": round(interval.loss, 3) if interval else None,
        "test_loss_low": round(interval.low, 3) if interval else None,
        "test_loss_high": round(interval.high, 3) if interval else None,
        "share_of_gain_without_privacy": (
            round(frontier.share(interval.loss), 3) if interval else None
        ),
        "inside_what_was_measured": interval is not None,
        "nearest_clients": nearest.clients,
        "nearest_epsilon": nearest.epsilon,
        "nearest_rounds": nearest.rounds,
        "nearest_settings": _settings_of(nearest),
        "nearest_test_loss": round(nearest.loss, 3),
        "differences_from_nearest": list(prediction.differences),
    }


def _settings_of(row: Measured) -> str:
    """Return a row's settings in words, but for its clients and epsilon."""
    rate = f"{row.server_learning_rate:g}"
    if row.server_learning_rate_min != row.server_learning_rate:
        rate += f" to {row.server_learning_rate_min:g}"
    steps = "one step" if row.local_steps == 1 else f"{row.local_steps} local steps"
    return (
        f"{rounds_text(row.rounds)} of {steps} of rate {row.learning_rate:g}, {row.kind} r={row.rank}, "
        f"batch size {row.batch_size}, "
        f"server learning rate {rate} at clipping norm {row.clipping_norm:g}"
    )


def _better(
    config: RunConfig,
    settings: PrivacySettings,
    prediction: Prediction,
    frontier: Frontier,
) -> list[dict[str, Any]]:
    """Return measured federations that beat a measured run: one change each.

    The change is to more clients, other local steps, a larger epsilon or another kind of
    adapter; rounds and steps are those that were measured with it.
    """
    if prediction.interval is None:
        return []
    best: dict[str, Measured] = {}
    for row in frontier.private_rows:
        change = _change(config, settings, row)
        if change and row.loss < prediction.interval.loss - _WORTH_A_CHANGE:
            best[change] = min(row, best.get(change, row), key=lambda r: r.loss)
    return [
        {
            "change": change,
            "settings": _settings_of(row),
            "test_loss": round(row.loss, 3),
        }
        for change, row in sorted(best.items(), key=lambda item: item[1].loss)
    ]


def _change(config: RunConfig, settings: PrivacySettings, row: Measured) -> str | None:
    """Return the one change from a run to a row; None if there are more, or none."""
    # By the noise that the adapter bears, which is what a row was measured with.
    now = _spent(settings, settings.opened_noise, settings.planned_rounds).zero_out
    then = _spent(settings, row.noise_multiplier, row.rounds).zero_out
    weaker = then > now * (1 + _SAME_EPSILON)
    same_kind = (row.kind, row.rank) == (config.adapter.kind, config.adapter.rank)
    clients = settings.population_size
    if same_kind and not weaker and row.clients > clients:
        return f"{row.clients} clients"
    steps = row.local_steps
    if same_kind and not weaker and row.clients == clients:
        return None if steps == config.train.local_steps else f"{steps} local steps"
    if same_kind and weaker and row.clients == clients:
        return f"epsilon {then:.3g}"
    if row.kind != config.adapter.kind and not weaker and row.clients == clients:
        return f"adapter.kind={row.kind}"
    return None
