"""The measured frontier: private federations that were run, with their test losses.

The rows come with the package (frontier.json). `benchmarks/frontier.py` measures and writes
them; docs/results.md, "The frontier", discusses them.
"""

import json
import math
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from fedllm.config import Scalar


@dataclass(frozen=True, kw_only=True)
class FederationSettings:
    """The settings that differ from one measured federation to another.

    Attributes:
        kind: Kind of the adapter.
        rank: Its rank; without meaning for a kind that has none.
        clients: Clients, all of them in every round.
        rounds: Rounds T.
        noise_multiplier: z; 0.0 without noise.
        clipping_norm: C.
        server_learning_rate: Of round 1.
        server_learning_rate_min: Of the last round.
        batch_size: Examples of a client's batch.
        local_steps: Steps of a client in a round.
        learning_rate: Of these steps.
    """

    kind: str
    rank: int
    clients: int
    rounds: int
    noise_multiplier: float
    clipping_norm: float
    server_learning_rate: float
    server_learning_rate_min: float
    batch_size: int
    local_steps: int = 1
    learning_rate: float = 1.0

    @property
    def noise_level(self) -> float:
        """Z * sqrt(T) / n, see `noise_level`."""
        return noise_level(self.noise_multiplier, self.rounds, self.clients)

    @property
    def mean_server_learning_rate(self) -> float:
        """Mean over the rounds of a half cosine between the two rates."""
        if self.rounds == 1:
            return self.server_learning_rate
        return (self.server_learning_rate + self.server_learning_rate_min) / 2

    @property
    def step(self) -> float:
        """Norm by which a round moves the adapter at most, on average over the rounds."""
        step = self.mean_server_learning_rate * self.clipping_norm
        # A product that rounds to 0 would have no logarithm.
        return max(step, sys.float_info.min)


@dataclass(frozen=True, kw_only=True)
class Measured(FederationSettings):
    """One row of frontier.json: a federation that was run, once for each seed.

    Attributes:
        num_trainable: d.
        epsilon: Zero-out epsilon at delta 1e-5; None without noise.
        test_losses: Test loss after the run, one for each seed, in nats per token.
    """

    num_trainable: int
    epsilon: float | None
    test_losses: tuple[float, ...]

    @property
    def loss(self) -> float:
        """Mean test loss over the seeds."""
        return sum(self.test_losses) / len(self.test_losses)

    @property
    def seed_spread(self) -> float:
        """Half of the range of the test losses over the seeds."""
        return (max(self.test_losses) - min(self.test_losses)) / 2


@dataclass(frozen=True)
class Frontier:
    """The measured federations and what they have in common.

    Attributes:
        model: Base model.
        data: Data set.
        loss_before: Test loss of the base.
        loss_without_privacy: Best test loss of a federation without privacy.
        settings: Settings of all rows, by their keys in the run config.
        rows: The federations.
    """

    model: str
    data: str
    loss_before: float
    loss_without_privacy: float
    settings: Mapping[str, Scalar]
    rows: tuple[Measured, ...]

    def share(self, loss: float) -> float:
        """Return a loss as a share of the best gain without privacy."""
        return (self.loss_before - loss) / (
            self.loss_before - self.loss_without_privacy
        )

    @property
    def private_rows(self) -> list[Measured]:
        """The federations that were measured under noise."""
        return [row for row in self.rows if row.epsilon is not None]

    @property
    def kinds(self) -> list[str]:
        """Kinds of adapter that were measured under noise."""
        return sorted({row.kind for row in self.private_rows})


@dataclass(frozen=True)
class Bracket:
    """The two measured federations round a noise level; the same one twice at an end.

    Attributes:
        below: The one with at most this noise.
        above: The one with at least this noise.
        share: Position between them in the logarithm of the noise level: 0.0 is `below`.
    """

    below: Measured
    above: Measured
    share: float

    @property
    def nearest(self) -> Measured:
        """The nearer of the two."""
        return self.below if self.share <= 0.5 else self.above

    @property
    def loss(self) -> float:
        """Interpolated test loss."""
        return self.below.loss + self.share * (self.above.loss - self.below.loss)

    @property
    def step(self) -> float:
        """Interpolated step."""
        ratio = self.above.step / self.below.step
        return float(self.below.step * ratio**self.share)


def bracket(rows: Iterable[Measured], level: float) -> Bracket | None:
    """Return the measured federations on both sides of a noise level.

    Of several rows at one noise level the best counts. Beyond the rows both sides are the
    row at that end.

    Args:
        rows: Federations that were measured under noise.
        level: `noise_level`, > 0.

    Returns:
        None if there are no rows.
    """
    best: dict[float, Measured] = {}
    for row in rows:
        place = round(math.log(row.noise_level), 9)
        best[place] = min(row, best.get(place, row), key=lambda r: r.loss)
    if not best:
        return None
    x = min(max(math.log(level), min(best)), max(best))
    below = max(place for place in best if place <= x)
    above = min(place for place in best if place >= x)
    share = 0.0 if above == below else (x - below) / (above - below)
    return Bracket(best[below], best[above], share)


def noise_level(
    noise_multiplier: float, num_rounds: int, num_sampled_clients: float
) -> float:
    """Return z * sqrt(T) / n: the noise that adds up over a run, for a step of one.

    It is the noise of each coordinate, divided by clipping norm and mean server learning rate.
    Runs with the same level tolerate steps of the same total length, whatever their number of
    clients and epsilon; a run of few rounds cannot use that length as well.
    """
    return noise_multiplier * math.sqrt(num_rounds) / num_sampled_clients


_LONGEST_STEP = {1: 1.0}
_LONGEST_STEP_OF_MANY = 10 / 3


def step_by_rule(level: float, local_steps: int = 1) -> float:
    """Return a server learning rate for `ffa-lora` from the noise alone.

    The mean over the rounds, for a clipping norm of 0.6: 0.09 / level, at most 1 after one
    SGD step of rate 1 on the client, and at most 10/3 after about ten, whose updates agree
    more from client to client. So the noise that adds up in a coordinate is the same in
    every run, unless that would take steps that are too long even without noise. The rule needs
    no data; docs/results.md has its measurements.

    Args:
        level: `noise_level` of the planned run, > 0.
        local_steps: Steps of a client in a round.
    """
    return min(_LONGEST_STEP.get(local_steps, _LONGEST_STEP_OF_MANY), 0.09 / level)


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
