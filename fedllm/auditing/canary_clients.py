"""Canary clients in rounds of the real strategy, and the bound on epsilon that they give."""

import math
import secrets
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from flwr.app import RecordDict

from fedllm.auditing.harness import Bench
from fedllm.privacy.lower_bounds import (
    CertifiedBound,
    Estimate,
    certified_bound,
    equivalent_mu,
    guess,
    one_shot_estimate,
    planned_guesses,
)
from fedllm.privacy.mechanism import Vector

# A canary sends more than C, so that a strategy that does not clip is detected.
_EXCESS = 10.0
# Clipped updates of honest clients had a mean of norm 0.78 to 0.91 C: two of them have a
# cosine of about this.
_HONEST_COSINE = 0.7


@dataclass(frozen=True)
class Findings:
    """The epsilons that the canaries of some rounds give.

    Attributes:
        rounds: Rounds that they took part in.
        accounted: The ledger's zero-out epsilon of these rounds.
        certified: Lower bound on epsilon at the ledger's delta.
        estimate: The estimate; None under Poisson sampling, whose releases are a mixture
            that it does not describe.
        expected_mu: The `estimate.mu` of a mechanism with the accounted epsilon.
    """

    rounds: int
    accounted: float
    certified: CertifiedBound
    estimate: Estimate | None
    expected_mu: float


class _Directions:
    """Random unit vectors, made again each time: all together would fill the memory."""

    def __init__(self, dimension: int) -> None:
        self._dimension = dimension
        self._key = secrets.randbits(128)

    def __getitem__(self, index: int) -> npt.NDArray[np.float32]:
        """Return direction `index`, (d,) float32."""
        generator = np.random.default_rng([self._key, index])
        vector = generator.standard_normal(self._dimension, dtype=np.float32)
        return vector / np.linalg.norm(vector)


def run_canaries(
    bench: Bench, num_canaries: int, num_rounds: int, honest: bool = True
) -> Findings:
    """Run rounds in which each canary takes part if its own fair coin says so.

    A canary that does not take part sends nothing: the zero-out relation. The score of a
    canary is the cosine of its direction with the sum of all releases. An attacker who sees
    nothing but the releases of a Gaussian mechanism can learn no more about it.

    Args:
        bench: Its last `num_canaries` clients are the canaries, the others are honest.
        num_canaries: m, at least 1.
        num_rounds: Rounds, fewer if `privacy.max-epsilon` ends them.
        honest: Whether the other clients send anything.

    Raises:
        NotAsPromisedError: As of `Bench.release`.
        ValueError: Noise that is not a number left the strategy.
    """
    settings = bench.settings
    canaries = bench.population[-num_canaries:]
    directions = _Directions(settings.num_trainable)
    included = np.array([secrets.randbits(1) == 1 for _ in canaries])
    taking_part = {n for n, coin in zip(canaries, included, strict=True) if coin}
    total = np.zeros(settings.num_trainable)
    rounds = 0
    while rounds < num_rounds and bench.ledger.may_spend(settings.max_epsilon):
        rounds += 1
        cohort = bench.cohort(rounds)
        if not honest:
            cohort = [node for node in cohort if node in taking_part]
        if settings.sampling == "fixed":
            # No amplification is claimed, so the epsilon holds for the clients chosen here.
            rest = [node for node in cohort if node < canaries[0]]
            cohort = rest + sorted(taking_part)
        sent = _contents(bench, cohort, canaries[0], taking_part, directions)
        total += bench.release(rounds, sent)
    accounted = bench.ledger.epsilons().zero_out
    expected_mu = equivalent_mu(accounted, settings.delta)
    scores = _cosines(total, canaries, directions)
    scores_in, scores_out = scores[included], scores[~included]
    guesses = planned_guesses(num_canaries, expected_mu, settings.delta)
    right = guess(scores_in, scores_out, guesses)
    estimate = None
    if settings.sampling != "poisson" and 0 < included.sum() < num_canaries:
        estimate = one_shot_estimate(
            scores_in, scores_out, settings.num_trainable, settings.delta
        )
    bound = certified_bound(num_canaries, guesses, right, settings.delta)
    return Findings(rounds, accounted, bound, estimate, expected_mu)


def _contents(
    bench: Bench,
    cohort: list[int],
    first_canary: int,
    taking_part: set[int],
    directions: _Directions,
) -> Iterator[tuple[int, RecordDict]]:
    """Yield each client's reply of one round, made only when it is needed."""
    clipping_norm = bench.settings.clipping_norm
    common = math.sqrt(_HONEST_COSINE) * directions[0]
    own = math.sqrt(1 - _HONEST_COSINE)
    for node in cohort:
        if node in taking_part:
            update = _EXCESS * clipping_norm * directions[node]
        elif node < first_canary:
            update = 1.5 * clipping_norm * (common + own * directions[node])
        else:
            continue
        yield node, bench.content(node, update)


def _cosines(total: Vector, canaries: list[int], directions: _Directions) -> Vector:
    """Return the cosine of each canary's direction with the sum of releases."""
    length = float(np.linalg.norm(total))
    if not math.isfinite(length) or length == 0:
        raise ValueError(f"the releases have norm {length}")
    unit = (total / length).astype(np.float32)
    return np.array([float(np.dot(directions[node], unit)) for node in canaries])
