"""The test loss to expect of a planned run, or the answer that nothing like it was measured.

A prediction is made only inside what was measured. Outside, an extrapolated interval would
exclude what the run comes to: three rounds for 20 clients reach 3.1, and the noise alone would
promise 2.8.
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
"""Between the steps of a run and of the rows that speak for it. Steps 1.5 times as long cost
up to 0.08 where that was measured, steps 2.8 times as long all of the gain."""

_LOSS_BY_STEP = 0.2
"""Nats for a step e times as long or as short, at most: 0.077 / ln 1.5 was measured."""

_LARGEST_CLIENTS_RATIO = 1.1
"""Between the clients of a run and of the rows: what they share of the data differs too."""

_SAME = 0.01
"""Noise and steps that differ by less than this share are the same."""


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
    """What the frontier says of a run.

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
    rounds, batch size and about the clients, clipping norm and steps of these rows.

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
    """Return what of a run is compared with the rows."""
    return FederationSettings(
        kind=config.adapter.kind,
        rank=config.adapter.rank,
        clients=settings.population_size,
        rounds=settings.planned_rounds,
        noise_multiplier=settings.noise_multiplier,
        clipping_norm=settings.clipping_norm,
        server_learning_rate=config.strategy.server_learning_rate,
        server_learning_rate_min=config.strategy.server_learning_rate_min,
        batch_size=config.train.batch_size,
    )


def _unshared_settings(config: RunConfig, frontier: Frontier) -> list[str]:
    """Return the settings that all rows share and the run does not have."""
    shared = {
        "model.name": frontier.model,
        "data.name": frontier.data,
        **frontier.settings,
    }
    given = flat(config)
    return [
        f"{key} {given[key]} (measured: {value})"
        for key, value in shared.items()
        if given[key] != value
    ]


def _differences(run: FederationSettings, row: Measured) -> list[str]:
    """Return how a run differs from a row, with the row's value."""
    pairs: list[tuple[str, object, object]] = [
        ("adapter.kind", run.kind, row.kind),
        ("clients", run.clients, row.clients),
        ("rounds", run.rounds, row.rounds),
        ("train.batch-size", run.batch_size, row.batch_size),
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
    """Return how far a row is from a run: another kind, then the sum of log ratios."""
    ratios = [
        (run.clients, row.clients),
        (run.rounds, row.rounds),
        (run.noise_level, row.noise_level),
        (run.step, row.step),
        (run.batch_size, row.batch_size),
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
    found = bracket(same or alike, run.noise_level)
    if found is None:
        return None
    inside = found.below is not found.above or _within(
        run.noise_level, found.nearest.noise_level, 1 + _SAME
    )
    if not inside or not _within(run.step, found.step, _LARGEST_STEP_RATIO):
        return None
    seeds = max(found.below.seed_spread, found.above.seed_spread)
    between = abs(found.above.loss - found.below.loss)
    spread = max(seeds + between * min(found.share, 1 - found.share), _SEED_SPREAD)
    spread += _LOSS_BY_STEP * abs(math.log(run.step / found.step))
    return Interval(found.loss, found.loss - spread, found.loss + spread)


def _is_like(run: FederationSettings, row: Measured) -> bool:
    """Return whether a row may speak for a run, as far as noise and steps allow."""
    return (
        run.kind == row.kind
        and (run.rank == row.rank or not kind_of(run.kind).has_rank)
        and run.rounds == row.rounds
        and run.batch_size == row.batch_size
        and _within(run.clients, row.clients, _LARGEST_CLIENTS_RATIO)
        and _within(run.clipping_norm, row.clipping_norm, _LARGEST_STEP_RATIO)
    )


def _within(value: float, other: float, ratio: float) -> bool:
    """Return whether two positive numbers differ by at most a factor."""
    return abs(math.log(value / other)) <= math.log(ratio)
