"""Predict the test loss of a planned run, if runs like it were measured.

Outside what was measured, an extrapolated interval would exclude the run's result: three rounds
for 20 clients reach 3.1, where the noise alone would promise 2.8. So there is no prediction
there, only the nearest measured run and the differences from it.
"""

import math
from dataclasses import dataclass

from fedllm.adapters.kinds import kind_of
from fedllm.config import RunConfig, flat
from fedllm.planning.frontier import (
    FederationSettings,
    Frontier,
    Measured,
    bracket,
)
from fedllm.privacy.ledger import PrivacySettings

_SEED_SPREAD = 0.03
"""Half of the range of test losses over seeds and noise draws (docs/results.md)."""

_LARGEST_STEP_RATIO = 1.4
"""Between the steps of a run and of the rows that predict it. Steps 1.5 times as long or short
cost up to 0.08 in the measurements, steps 2.8 times as long the whole gain."""

_LOSS_BY_STEP = 0.2
"""Largest cost in nats of a step e times as long or short: 0.077 / ln 1.5 was measured."""

_LARGEST_CLIENTS_RATIO = 1.1
"""Between the clients of a run and of the rows: with it, each client's share of the data
changes too."""

_SAME = 0.01
"""Relative difference below which noise and steps count as equal."""


@dataclass(frozen=True)
class Interval:
    """The test loss to expect on the frontier's model and data, nats per token.

    Attributes:
        loss: The test loss.
        low: The same if it goes well.
        high: The same if it goes badly.
    """

    loss: float
    low: float
    high: float


@dataclass(frozen=True)
class Prediction:
    """The prediction for a run, and the nearest measured federation.

    Attributes:
        interval: The test loss to expect; None if nothing like this run was measured.
        nearest: The measured federation that is most alike.
        differences: How the run differs from that one, with the measured value.
    """

    interval: Interval | None
    nearest: Measured
    differences: tuple[str, ...]


def predict(
    config: RunConfig, settings: PrivacySettings, frontier: Frontier
) -> Prediction:
    """Predict the test loss of a run with client-level privacy.

    A run is inside what was measured if it has the settings that all rows share and, with at
    least one row on each side of its noise level (or one at its level), the kind, rank,
    rounds, batch size, local steps, learning rate and about the clients, clipping norm and steps of these rows.

    Args:
        config: The run config, with a kind that is not `auto`.
        settings: The noise and the federation that it is for.
        frontier: The measured federations; at least one of them under noise.
    """
    run = _federation_settings(config, settings)
    rows = frontier.private_rows
    nearest = min(rows, key=lambda row: _distance(run, row))
    unshared = _unshared_settings(config, frontier)
    differences = (*unshared, *_differences(run, nearest))
    interval = None if unshared else _interval(run, rows)
    return Prediction(interval, nearest, differences)


def _federation_settings(
    config: RunConfig, settings: PrivacySettings
) -> FederationSettings:
    """Return the settings of a run that are compared with the rows."""
    return FederationSettings(
        kind=config.adapter.kind,
        rank=config.adapter.rank,
        clients=settings.population_size,
        rounds=settings.planned_rounds,
        noise_multiplier=settings.opened_noise,
        clipping_norm=settings.clipping_norm,
        server_learning_rate=config.strategy.server_learning_rate,
        server_learning_rate_min=config.strategy.server_learning_rate_min,
        batch_size=config.train.batch_size,
        local_steps=config.train.local_steps,
        learning_rate=config.train.learning_rate,
    )


def _unshared_settings(config: RunConfig, frontier: Frontier) -> list[str]:
    """Return the settings that all rows share and the run does not have."""
    shared = {
        "model.name": frontier.model,
        "data.name": frontier.data,
        **frontier.settings,
    }
    given = flat(config)
    out = [
        f"{key} {given[key]} (measured: {value})"
        for key, value in shared.items()
        if given[key] != value
    ]
    train = config.train
    if train.learning_rate_min != train.learning_rate:
        out.append(
            f"train.learning-rate-min {train.learning_rate_min:g} (measured: as "
            "train.learning-rate)"
        )
    return out


def _differences(run: FederationSettings, row: Measured) -> list[str]:
    """Return the differences of a run from a row, with the row's values in brackets."""
    pairs: list[tuple[str, object, object]] = [
        ("adapter.kind", run.kind, row.kind),
        ("clients", run.clients, row.clients),
        ("rounds", run.rounds, row.rounds),
        ("train.batch-size", run.batch_size, row.batch_size),
        ("train.local-steps", run.local_steps, row.local_steps),
        ("train.learning-rate", run.learning_rate, row.learning_rate),
    ]
    if kind_of(run.kind).has_rank:
        pairs.insert(1, ("adapter.rank", run.rank, row.rank))
    out = [
        f"{name} {ours} ({theirs})" for name, ours, theirs in pairs if ours != theirs
    ]
    for name, given, measured in (
        ("noise multiplier", run.noise_multiplier, row.noise_multiplier),
        ("clipping norm", run.clipping_norm, row.clipping_norm),
        (
            "mean server learning rate",
            run.mean_server_learning_rate,
            row.mean_server_learning_rate,
        ),
    ):
        if not _within(given, measured, 1 + _SAME):
            out.append(f"{name} {given:.3g} ({measured:.3g})")
    return out


def _distance(run: FederationSettings, row: Measured) -> tuple[bool, float]:
    """Return the distance of a row from a run: another kind, then a sum of log ratios."""
    ratios = [
        (run.clients, row.clients),
        (run.rounds, row.rounds),
        (run.noise_level, row.noise_level),
        (run.step, row.step),
        (run.batch_size, row.batch_size),
        # 0 is a whole epoch of steps.
        (run.local_steps or 1, row.local_steps),
        (run.learning_rate, row.learning_rate),
    ]
    if kind_of(run.kind).has_rank:
        ratios.append((run.rank, row.rank))
    return run.kind != row.kind, sum(abs(math.log(a / b)) for a, b in ratios)


def _interval(run: FederationSettings, rows: list[Measured]) -> Interval | None:
    """Interpolate the rows that are like a run; None if they do not enclose it."""
    alike = [row for row in rows if _is_like(run, row)]
    same = [
        row
        for row in alike
        if _within(run.noise_level, row.noise_level, 1 + _SAME)
        and _within(run.step, row.step, 1 + _SAME)
    ]
    sides = bracket(same or alike, run.noise_level)
    if sides is None:
        return None
    inside = sides.below is not sides.above or _within(
        run.noise_level, sides.nearest.noise_level, 1 + _SAME
    )
    if not inside or not _within(run.step, sides.step, _LARGEST_STEP_RATIO):
        return None
    seeds = max(sides.below.seed_spread, sides.above.seed_spread)
    between = abs(sides.above.loss - sides.below.loss)
    spread = max(seeds + between * min(sides.share, 1 - sides.share), _SEED_SPREAD)
    spread += _LOSS_BY_STEP * abs(math.log(run.step / sides.step))
    return Interval(sides.loss, sides.loss - spread, sides.loss + spread)


def _is_like(run: FederationSettings, row: Measured) -> bool:
    """Return whether a row is like a run in all but noise and step."""
    return (
        run.kind == row.kind
        and (run.rank == row.rank or not kind_of(run.kind).has_rank)
        and run.rounds == row.rounds
        and run.batch_size == row.batch_size
        and run.local_steps == row.local_steps
        and run.learning_rate == row.learning_rate
        and _within(run.clients, row.clients, _LARGEST_CLIENTS_RATIO)
        and _within(run.clipping_norm, row.clipping_norm, _LARGEST_STEP_RATIO)
    )


def _within(value: float, other: float, ratio: float) -> bool:
    """Return whether two positive numbers differ by at most a factor."""
    return abs(math.log(value / other)) <= math.log(ratio)
