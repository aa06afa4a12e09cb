"""Is it worth anything: the noise against the signal, and what would help."""

import json
import math
from dataclasses import dataclass
from functools import cache
from importlib.resources import files


@dataclass(frozen=True)
class Measured:
    """One row of frontier.json: a federation that was run, with its seeds.

    Attributes:
        kind: Kind of the adapter.
        rank: Its rank; 0 where the kind has none.
        num_trainable: d.
        clients: Clients, all of them in every round.
        epsilon: Zero-out epsilon at delta 1e-5; None without noise.
        rounds: Rounds T.
        noise_multiplier: z; 0.0 without noise.
        clipping_norm: C.
        server_learning_rate: Of round 1.
        server_learning_rate_min: Of the last round.
        test_losses: Test loss after the run, one for each seed, in nats per token.
    """

    kind: str
    rank: int
    num_trainable: int
    clients: int
    epsilon: float | None
    rounds: int
    noise_multiplier: float
    clipping_norm: float
    server_learning_rate: float
    server_learning_rate_min: float
    test_losses: tuple[float, ...]

    @property
    def noise_level(self) -> float:
        """Z * sqrt(T) / n, see `noise_level`."""
        return noise_level(self.noise_multiplier, self.rounds, self.clients)

    @property
    def loss(self) -> float:
        """Mean test loss over the seeds."""
        return sum(self.test_losses) / len(self.test_losses)


@dataclass(frozen=True)
class Frontier:
    """What was measured: see docs/results.md for the script.

    Attributes:
        model: Base model.
        data: Data set.
        loss_before: Test loss of the base.
        loss_without_privacy: Best test loss of a federation without privacy.
        rows: The federations.
    """

    model: str
    data: str
    loss_before: float
    loss_without_privacy: float
    rows: tuple[Measured, ...]

    def share(self, loss: float) -> float:
        """Return a loss as a share of the best gain without privacy."""
        return (self.loss_before - loss) / (
            self.loss_before - self.loss_without_privacy
        )

    @property
    def kinds(self) -> list[str]:
        """Kinds of adapter that were measured under noise."""
        return sorted({row.kind for row in self.rows if row.epsilon is not None})


@dataclass(frozen=True)
class Expected:
    """What a run may come to, going by the frontier.

    Attributes:
        loss: Test loss on the frontier's model and data, nats per token.
        low: The same if it goes well.
        high: The same if it goes badly.
        share: `loss` as a share of the best gain without privacy.
        nearest: The measured federation that is most alike.
        inside: Whether the noise lies within what was measured.
        optimistic: Whether it is above all that was measured: expect less than this.
    """

    loss: float
    low: float
    high: float
    share: float
    nearest: Measured
    inside: bool
    optimistic: bool


def noise_level(
    noise_multiplier: float, num_rounds: int, num_sampled_clients: float
) -> float:
    """Return z * sqrt(T) / n: the noise that adds up over a run, a unit of path.

    In each coordinate, divided by clipping norm and mean step. Runs with the same level
    bear steps of the same total length, whatever their number of clients and epsilon; a
    run of few rounds cannot make as good use of that length.
    """
    return noise_multiplier * math.sqrt(num_rounds) / num_sampled_clients


def step_by_rule(level: float) -> float:
    """Return a server learning rate for `ffa-lora` from the noise alone.

    The mean over the rounds, for a clipping norm of 0.6 and one SGD step of rate 1 on the
    client: 0.09 / level, at most 1. So the noise that adds up in a coordinate is the same
    in every run, but where that would ask for steps that are too long without any noise.
    It needs no data; how it was found stands in docs/results.md.

    Args:
        level: `noise_level` of the planned run, > 0.
    """
    return min(1.0, 0.09 / level)


@cache
def load_frontier() -> Frontier:
    """Read frontier.json, which comes with the package."""
    content = json.loads(
        (files("fedllm.planning") / "frontier.json").read_text("utf-8")
    )
    rows = tuple(
        Measured(**{**row, "test_losses": tuple(row["test_losses"])})
        for row in content.pop("rows")
    )
    return Frontier(**content, rows=rows)


def expected(kind: str, level: float, frontier: Frontier) -> Expected | None:
    """Interpolate the frontier of one kind of adapter in the log of the noise level.

    Args:
        kind: Kind of adapter.
        level: `noise_level` of the planned run, > 0.
        frontier: What was measured.

    Returns:
        None where the kind was not measured under noise. The interval holds the seeds of
        both neighbours, and half of the distance between them.
    """
    best: dict[float, Measured] = {}
    for row in frontier.rows:
        if row.kind == kind and row.noise_multiplier > 0:
            # Of several settings at one level, the best counts.
            place = round(math.log(row.noise_level), 9)
            best[place] = min(row, best.get(place, row), key=lambda r: r.loss)
    if not best:
        return None
    wanted = math.log(level)
    x = min(max(wanted, min(best)), max(best))
    below = max(place for place in best if place <= x)
    above = min(place for place in best if place >= x)
    share = 0.0 if above == below else (x - below) / (above - below)
    first, second = best[below], best[above]
    loss = first.loss + share * (second.loss - first.loss)
    seeds = max(max(r.test_losses) - min(r.test_losses) for r in (first, second)) / 2
    between = abs(second.loss - first.loss) * min(share, 1 - share)
    spread = max(seeds + between, _SEED_SPREAD)
    return Expected(
        loss,
        loss - spread,
        loss + spread,
        frontier.share(loss),
        first if share <= 0.5 else second,
        inside=abs(wanted - x) < 1e-6,
        optimistic=wanted - x > 1e-6,
    )


_SEED_SPREAD = 0.03
"""Half of the range of test losses over seeds and noise draws (docs/results.md)."""
