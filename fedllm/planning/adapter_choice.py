"""The choice of the adapter kind for `adapter.kind="auto"`.

Only public settings and earlier measurements enter, so the choice costs no privacy. Kinds are
ranked by the noise that adds up over the run, whatever the number of clients and rounds: a
ranking needs less than a prediction does (`fedllm.planning.prediction`).
"""

import math
from dataclasses import dataclass, replace

from fedllm.adapters.kinds import KINDS, kind_of
from fedllm.adapters.resolve import with_kind
from fedllm.config import AdapterKind, RunConfig
from fedllm.planning.frontier import (
    Frontier,
    Measured,
    bracket,
    load_frontier,
    noise_level,
)
from fedllm.planning.noise import privacy_settings

_FALLBACK: AdapterKind = "ffa-lora"

# A measurement says nothing of a run whose noise differs by more than this factor.
_REACH = 4.0

# Of the logarithm of a noise level.
_ROUNDING = 1e-6


@dataclass(frozen=True)
class Choice:
    """A kind of adapter for a federation, with its reason.

    Attributes:
        kind: The kind of adapter.
        reason: One line for a person.
        measured: The measured federation that is most alike; None if none is.
    """

    kind: AdapterKind
    reason: str
    measured: Measured | None = None


def choose_adapter(
    config: RunConfig, population_size: int, frontier: Frontier | None = None
) -> Choice:
    """Return the kind with the best expected gain for a federation.

    Args:
        config: The run config, which gives rounds, epsilon or noise, and sampling.
        population_size: Clients in the federation, N.
        frontier: The measured federations; None: those that come with the package.
    """
    frontier = load_frontier() if frontier is None else frontier
    # Of the kinds that have a rank only what was measured with this one counts, and for
    # all with as many local steps: the steps of the server go with them.
    rank = config.adapter.rank
    rows = tuple(
        row
        for row in frontier.rows
        if row.local_steps == config.train.local_steps
        and (row.rank == rank or not kind_of(row.kind).has_rank)
    )
    frontier = replace(frontier, rows=rows)
    level, noise = 0.0, "no noise"
    if config.privacy.unit != "none":
        # The number of values, here 1, does not enter what is used of the settings.
        settings = privacy_settings(config, population_size, 1)
        rounds, sampled = config.num_server_rounds, settings.num_sampled_clients
        level = noise_level(settings.opened_noise, rounds, sampled)
        noise = f"noise level {level:.3g}"
    gains = {kind: expected_gain(kind, level, frontier) for kind in KINDS}
    known = {kind: gain for kind, gain in gains.items() if gain is not None}
    situation = f"{population_size} clients, {config.num_server_rounds} rounds, {noise}"
    if not known:
        return Choice(
            _FALLBACK, f"nothing was measured near {situation}, so the default is used"
        )
    ranked = sorted(known, key=lambda kind: -known[kind])
    shares = ", ".join(f"{kind} {known[kind]:.0%}" for kind in ranked)
    rows = tuple(row for row in frontier.private_rows if row.kind == ranked[0])
    measured = bracket(rows, level) if level > 0 else None
    return Choice(
        ranked[0],
        f"share of the best gain, going by the noise alone, with {situation}: {shares}",
        measured.nearest if measured else None,
    )


def expected_gain(kind: str, level: float, frontier: Frontier) -> float | None:
    """Return the share of the best gain to expect of a kind of adapter.

    Args:
        kind: The kind of adapter.
        level: `noise_level` of the planned run; 0.0 without noise.
        frontier: The measured federations.

    Returns:
        None if nothing was measured within a factor of 4 of that noise, or only with less
        noise while another kind was measured with more. Without noise, None if the kind was
        not measured without noise.
    """
    if level == 0:
        quiet = [
            row.loss
            for row in frontier.rows
            if row.kind == kind and row.epsilon is None
        ]
        return frontier.share(min(quiet)) if quiet else None
    measured = bracket((r for r in frontier.private_rows if r.kind == kind), level)
    if measured is None:
        return None
    nearest = measured.nearest.noise_level
    at_an_end = measured.below is measured.above
    most = max(row.noise_level for row in frontier.rows)
    if at_an_end and math.log(level / nearest) > _ROUNDING and nearest < most:
        # Its gain with less noise would be compared with another kind's gain with this noise.
        return None
    if at_an_end and not 1 / _REACH <= level / nearest <= _REACH:
        return None
    return frontier.share(measured.loss)


def with_choice(config: RunConfig, choice: Choice) -> RunConfig:
    """Return the server's run config with `auto` resolved: kind, clipping norm and step.

    An update of one kind is many times as long as one of another, so clipping norm and server
    learning rates are those that the kind was measured with.
    """
    config, measured = with_kind(config, choice.kind), choice.measured
    if measured is None:
        return config
    return replace(
        config,
        privacy=replace(config.privacy, clipping_norm=measured.clipping_norm),
        strategy=replace(
            config.strategy,
            server_learning_rate=measured.server_learning_rate,
            server_learning_rate_min=measured.server_learning_rate_min,
        ),
    )
