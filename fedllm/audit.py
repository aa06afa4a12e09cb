"""The audit of client-level privacy: what can be checked exactly, and canaries.

Every check runs rounds of the strategy that `make_strategy` makes for the settings of a
run, on a toy adapter and without a base model. What it finds is true of the code that
runs here: it says nothing of a server that runs other code.
"""

import contextlib
import itertools
import random
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import MetricRecord, RecordDict

from fedllm.bench import Bench, MakeStrategy, NotAsPromisedError, Vector, flat_values
from fedllm.config import RunConfig
from fedllm.errors import PrivacyError
from fedllm.hostile_replies import Content, hostile_replies
from fedllm.privacy.accounting import epsilons, plain
from fedllm.privacy.auditing import plausible_spread
from fedllm.privacy.ledger import PrivacySettings
from fedllm.privacy.mechanism import SecureGenerator
from fedllm.rehearsal import Findings, rehearse
from fedllm.replies import ARRAYS, METRICS, array_record
from fedllm.strategy import AdapterFedAvg, make_strategy

_MOST_REHEARSED = 10
_MOST_COUNTED = 100
# Sums of a few C in float64, and the division by n.
_ROUNDING = 1e-9
# A check of chance fails by chance with about this probability.
_BY_CHANCE = 1e-9
_SIGMAS = 6.0
_SMALL = 64
_FEW = 6


@dataclass(frozen=True)
class Check:
    """One line of an audit.

    Attributes:
        name: What is checked.
        passed: Whether it holds.
        text: What was found, with numbers.
    """

    name: str
    passed: bool
    text: str


@dataclass(frozen=True)
class Audit:
    """All that an audit found.

    Attributes:
        checks: In the order in which they ran.
        rehearsal: The canaries of the whole run; None where it could not be rehearsed.
    """

    checks: list[Check]
    rehearsal: Findings | None

    @property
    def passed(self) -> bool:
        """Whether every check holds."""
        return self.rehearsal is not None and all(c.passed for c in self.checks)

    def as_dict(self) -> dict[str, Any]:
        """Return the content of audit.json."""
        return {
            "passed": self.passed,
            "checks": [asdict(check) for check in self.checks],
            "rehearsal": asdict(self.rehearsal) if self.rehearsal else None,
            "meaning": MEANING,
        }


MEANING = (
    "An audit can convict and never acquit: the certified bound is a lower bound on "
    "epsilon (false with probability 0.05), and the estimate assumes the Gaussian "
    "mechanism. That nothing was found proves nothing about what was not tried; the "
    "accounted epsilon rests on the proof of the mechanism, not on this."
)


class Auditor:
    """Audits the strategy of one run.

    Args:
        config: The run config, under `privacy.unit="client"`.
        settings: What the run promises: z, C, delta and the rounds are taken from it.
        num_clients: Honest clients of the rehearsal.
        num_canaries: Canary clients m.
        dimension: d of the toy adapter of noise checks and canaries.
        make: Makes the strategy.

    Raises:
        PrivacyError: The settings leave nothing to audit, or cannot be audited.
    """

    def __init__(
        self,
        config: RunConfig,
        settings: PrivacySettings,
        num_clients: int,
        num_canaries: int,
        dimension: int,
        make: MakeStrategy = make_strategy,
    ) -> None:
        _check_sizes(num_clients, num_canaries, dimension)
        _require_a_round(settings)
        self._config = config
        self._settings = settings
        self._num_clients = num_clients
        self._num_canaries = num_canaries
        self._dimension = dimension
        self._make = make
        self._rehearsal: Findings | None = None

    def run(self, say: Callable[[Check], None] = lambda check: None) -> Audit:
        """Run all checks.

        Args:
            say: Called with each check when it is done.
        """
        checks = []
        for name, check in self._all():
            try:
                passed, text = check()
            except NotAsPromisedError as error:
                passed, text = False, str(error)
            except Exception as error:  # noqa: BLE001 - whatever breaks is a finding
                passed, text = False, f"{type(error).__name__}: {error}"
            checks.append(Check(name, passed, text))
            say(checks[-1])
        return Audit(checks, self._rehearsal)

    def _all(self) -> Iterator[tuple[str, Callable[[], tuple[bool, str]]]]:
        yield "sensitivity", self._sensitivity
        yield "weights", self._weights
        yield "denominator", self._denominator
        yield "noise scale", self._noise_scale
        yield "fresh noise", self._fresh_noise
        yield "order", self._order
        yield "ledger", self._ledger
        if self._settings.sampling == "poisson":
            yield "secret coins", self._coins
        yield "canaries, one release", self._mechanism
        yield "canaries, the run", self._whole_run

    def _sensitivity(self) -> tuple[bool, str]:
        """Put each hostile reply among honest ones that all pull the same way."""
        with self._bench(_SMALL, silent=True) as bench:
            kinds = hostile_replies(bench.start, self._settings.clipping_norm)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # NumPy warns of hostile headers.
            sums = {kind: self._sum_with(content) for kind, content in kinds.items()}
        without = self._sum_with(None)
        size = {k: _norm(v - without) for k, v in sums.items()}
        worst = max(size, key=lambda kind: _nan_last(size[kind]))
        pairs = itertools.combinations(sums.values(), 2)
        swap = max((_nan_last(_norm(a - b)) for a, b in pairs), default=0.0)
        clip = self._settings.clipping_norm
        one, two = size[worst] / clip, swap / clip
        passed = one <= 1 + _ROUNDING and two <= 2 + _ROUNDING
        return passed, (
            f"of {len(kinds)} kinds of hostile reply none may move the sum by more than "
            f"1 C, nor by 2 C when it replaces another: {one:.9f} C "
            f"({worst!r}) and {two:.9f} C"
        )

    def _sum_with(self, content: Content | None) -> Vector:
        """Return the noiseless sum of honest replies and one more, in a fresh round."""
        with self._bench(_SMALL, silent=True) as bench:
            first, *others = bench.population
            replies = [(node, self._honest(bench, 2.0)) for node in others]
            hostile = [] if content is None else [(first, content)]
            return bench.release(1, [*replies, *hostile])

    def _weights(self) -> tuple[bool, str]:
        """Let one client claim more and more examples."""
        claims = (None, 1, 1_000_000)
        sums = []
        for claim in claims:
            with self._bench(_SMALL, silent=True) as bench:
                nodes = bench.population
                replies = [(n, self._honest(bench, -0.5, 1)) for n in nodes[1:]]
                replies.append((nodes[0], self._honest(bench, 0.5, claim)))
                sums.append(bench.release(1, replies))
        moved = max(_norm(s - sums[0]) for s in sums) / self._settings.clipping_norm
        return moved <= _ROUNDING, (
            "a client that claims 1,000,000 examples counts as one that claims 1 or "
            f"none: the sum moves by {moved:.3g} C"
        )

    def _denominator(self) -> tuple[bool, str]:
        """Make the same sum with all clients, with silent ones and with failed ones."""
        sums, expected = [], 0.5 * (_FEW // 2)
        for others in ("zero", "silent", "failed"):
            with self._bench(_SMALL, silent=True) as bench:
                half = len(bench.population) // 2
                replies = [(n, self._honest(bench, 0.5)) for n in bench.population]
                if others != "silent":
                    zero = others == "zero"
                    content = self._honest(bench, 0.0) if zero else RecordDict()
                    replies[half:] = [(n, content) for n, _ in replies[half:]]
                else:
                    del replies[half:]
                sums.append(bench.release(1, replies))
        clip = self._settings.clipping_norm
        # In float32 the replies are rounded, so the size is known to about 1e-6.
        off = max(abs(_norm(e) / clip - expected) / expected for e in sums)
        moved = max(_norm(e - sums[0]) for e in sums) / clip
        return moved <= _ROUNDING and off < 1e-4, (
            "half of the clients silent or failed moves the adapter as if they sent "
            f"zero: the sum over n differs by {moved:.3g} C, and from what was sent "
            f"by {off:.2g} of it"
        )

    def _noise_scale(self) -> tuple[bool, str]:
        """Measure the noise of rounds without and with clients."""
        squares = {"without": 0.0, "with": 0.0}
        rounds = 2
        promised = self._settings.noise_multiplier * self._settings.clipping_norm
        for _ in range(rounds):
            with self._bench(self._dimension) as bench:
                squares["without"] += float(np.sum(bench.release(1, []) ** 2))
            releases = []
            for silent in (True, False):
                with self._bench(self._dimension, silent=silent) as bench:
                    honest = self._honest(bench, 2.0)
                    replies = [(node, honest) for node in bench.population]
                    releases.append(bench.release(1, replies))
            squares["with"] += float(np.sum((releases[1] - releases[0]) ** 2))
        count = rounds * self._dimension
        ratios = {k: (s / count) ** 0.5 / promised for k, s in squares.items()}
        passed = all(
            plausible_spread(s, count, promised, _BY_CHANCE) for s in squares.values()
        )
        return passed, (
            f"standard deviation over the promised z C = {promised:.4g}: "
            f"{ratios['without']:.4f} without clients, {ratios['with']:.4f} with "
            f"{_FEW} ({count:,} values each)"
        )

    def _fresh_noise(self) -> tuple[bool, str]:
        """Compare the noise of two strategies and two rounds, all seeds set alike."""
        noise = []
        for _ in range(2):
            with self._bench(self._dimension) as bench, _seeded():
                kind = type(bench.strategy._generator)
                if kind is not SecureGenerator:
                    return False, f"the noise comes from {kind.__name__}"
                noise.append(bench.release(1, []))
                if bench.ledger.may_spend(self._settings.max_epsilon):
                    with _seeded():
                        noise.append(bench.release(2, []))
        pairs = list(itertools.combinations(noise, 2))
        largest = max(
            abs(float(np.dot(a, b))) / (_norm(a) * _norm(b)) for a, b in pairs
        )
        limit = _SIGMAS / self._dimension**0.5
        return largest < limit, (
            "with all seeds set alike no two of "
            f"{len(noise)} releases of two strategies resemble each other: largest "
            f"correlation {largest:.4f} (chance stays below {limit:.4f})"
        )

    def _order(self) -> tuple[bool, str]:
        """See that the adapter is made of the releases alone, for each optimiser."""
        worst, count = 0.0, 0
        size = 4096
        promised = self._settings.noise_multiplier * self._settings.clipping_norm
        plausible = True
        for optimizer in ("none", "momentum", "adam", "yogi"):
            strategy = replace(self._config.strategy, server_optimizer=optimizer)
            config = replace(self._config, strategy=strategy)
            with self._bench(size, config=config) as bench:
                twin = AdapterFedAvg(config, dict(bench.start), bench.population)
                squares, before = 0.0, flat_values(bench.start, bench.start)
                for server_round in self._rounds(bench, 3):
                    release = bench.release(server_round, [])
                    squares += float(np.sum(release**2))
                    twin.apply_update(server_round, bench.entered[-1])
                    left = bench.records[-1].to_numpy_ndarrays()
                    named = dict(zip(bench.records[-1], left, strict=True))
                    after = flat_values(named, bench.start)
                    expected = flat_values(twin.reference, bench.start)
                    step = max(_norm(expected - before), 1e-30)
                    worst = max(worst, _nan_last(_norm(after - expected) / step))
                    before = expected
                    count += 1
                values = size * (server_round if bench.entered else 0)
                plausible &= plausible_spread(squares, values, promised, _BY_CHANCE)
        return worst < 1e-3 and plausible, (
            "what enters the server optimiser is noised"
            f"{'' if plausible else ': NO'}, and what leaves is a function of it "
            f"alone: in {count} rounds with 4 optimisers the adapter differs from the "
            f"one made of the releases by {worst:.2g} of a step"
        )

    def _ledger(self) -> tuple[bool, str]:
        """Count the rounds, and recompute epsilon by dp-accounting alone."""
        with self._bench(_SMALL) as bench:
            planned = min(
                self._num_planned(_MOST_COUNTED), self._settings.planned_rounds
            )
            done = []
            for server_round in self._rounds(bench, planned):
                bench.release(server_round, [])
                done.append(server_round)
            content = bench.ledger.as_dict()
            counted = content["releases"] == done and content["num_rounds"] == len(done)
            before = bench.rounds_on_disk == done
        theirs = recomputed_epsilon(
            self._settings, content["sampling_probability"], done
        )
        agree = abs(content["epsilon"] - theirs) <= 1e-3 * theirs + 1e-6
        return counted and before and agree, (
            f"{len(done)} rounds released, {content['num_rounds']} in the ledger, each "
            f"on disk before the adapter moved{'' if before else ': NO'}; epsilon "
            f"{content['epsilon']:.4f}, by dp-accounting alone {theirs:.4f}"
        )

    def _coins(self) -> tuple[bool, str]:
        """Hold the sizes of many cohorts against the binomial."""
        from scipy.stats import binomtest

        q = self._config.strategy.fraction_train
        draws: list[tuple[int, ...]] = []
        for _ in range(2):
            with self._bench(_SMALL, num_clients=200) as bench, _seeded():
                draws += [tuple(bench.cohort(1)) for _ in range(20)]
        chosen, asked = sum(map(len, draws)), 200 * len(draws)
        chance = float(binomtest(chosen, asked, q).pvalue)
        # Two cohorts of 200 coins are the same with probability below 1e-9 for these q.
        repeated = 0.05 < q < 0.95 and len(set(draws)) < len(draws)
        return chance > _BY_CHANCE and not repeated, (
            f"{chosen} of {asked} coins fell for their client, expected "
            f"{q * asked:.0f}; {len(draws) - len(set(draws))} cohorts were drawn twice"
        )

    def _mechanism(self) -> tuple[bool, str]:
        return self._judged(self._canaries(1, honest=False))

    def _whole_run(self) -> tuple[bool, str]:
        self._rehearsal = self._canaries(
            self._num_planned(_MOST_REHEARSED), honest=True
        )
        return self._judged(self._rehearsal)

    def _canaries(self, num_rounds: int, honest: bool) -> Findings:
        clients = self._num_clients + self._num_canaries
        with self._bench(self._dimension, num_clients=clients) as bench:
            return rehearse(bench, self._num_canaries, num_rounds, honest)

    def _judged(self, found: Findings) -> tuple[bool, str]:
        """Hold what the canaries say against the ledger."""
        passed = found.certified.epsilon <= found.accounted
        text = (
            f"{found.rounds} round{'s' if found.rounds > 1 else ''} of "
            f"{self._settings.planned_rounds}: epsilon {plain(found.accounted)} "
            f"accounted, at least {found.certified.epsilon:.2f} certified "
            f"({found.certified.num_correct} of {found.certified.num_guesses} guesses "
            f"right)"
        )
        estimate = found.estimate
        if estimate is None:
            return passed, text
        excess = (estimate.mu - found.expected_mu) / estimate.mu_stddev
        return passed and excess < _SIGMAS, (
            f"{text}, {estimate.epsilon:.2f} estimated ({estimate.low:.2f} to "
            f"{estimate.high:.2f})"
        )

    def _num_planned(self, most: int) -> int:
        return min(self._settings.planned_rounds, most)

    def _rounds(self, bench: Bench, count: int) -> Iterator[int]:
        """Yield rounds until the budget ends."""
        for server_round in range(1, count + 1):
            if not bench.ledger.may_spend(self._settings.max_epsilon):
                return
            yield server_round

    def _honest(
        self, bench: Bench, norm: float, num_examples: int | None = None
    ) -> RecordDict:
        """Return a reply of `norm` times C, along the direction that all take."""
        size = self._settings.clipping_norm * norm
        d = bench.settings.num_trainable
        content = RecordDict(
            {ARRAYS: array_record(bench.update(np.full(d, size / d**0.5)))}
        )
        if num_examples is not None:
            content[METRICS] = MetricRecord({"num-examples": num_examples})
        return content

    @contextlib.contextmanager
    def _bench(
        self,
        dimension: int,
        num_clients: int = _FEW,
        silent: bool = False,
        config: RunConfig | None = None,
    ) -> Iterator[Bench]:
        """Put a fresh strategy with a ledger of its own on the bench."""
        with tempfile.TemporaryDirectory(prefix="fedllm-audit-") as folder:
            yield Bench(
                config or self._config,
                self._settings,
                dimension,
                num_clients,
                Path(folder),
                self._make,
                silent,
            )


def recomputed_epsilon(
    settings: PrivacySettings, sampling_probability: float, releases: list[int]
) -> float:
    """Return the zero-out epsilon of these releases by dp-accounting alone.

    Args:
        settings: Noise multiplier, delta and sampling.
        sampling_probability: q; amplification counts under `poisson` only.
        releases: The rounds.
    """
    import dp_accounting as dp
    from dp_accounting import pld

    if not releases:
        return 0.0
    z, count = settings.noise_multiplier, len(releases)
    if settings.sampling != "poisson" or sampling_probability >= 1:
        return float(dp.get_epsilon_gaussian(z / count**0.5, settings.delta))
    accountant = pld.PLDAccountant(dp.NeighboringRelation.REPLACE_SPECIAL)
    event = dp.PoissonSampledDpEvent(sampling_probability, dp.GaussianDpEvent(z))
    accountant.compose(dp.SelfComposedDpEvent(event, count))
    return float(accountant.get_epsilon(settings.delta))


@contextlib.contextmanager
def _seeded() -> Iterator[None]:
    """Seed the global generators as a trainer does, and put them back."""
    # ruff: noqa: NPY002 - the global generator is what is tested
    ours, theirs = random.getstate(), np.random.get_state()
    random.seed(1)
    np.random.seed(1)
    try:
        yield
    finally:
        random.setstate(ours)
        np.random.set_state(theirs)


def _norm(vector: Vector) -> float:
    return float(np.linalg.norm(vector))


def _nan_last(value: float) -> float:
    """Return what is not a number as the worst there is."""
    return value if value == value else float("inf")


def _require_a_round(settings: PrivacySettings) -> None:
    q = settings.num_sampled_clients / settings.population_size
    z, delta = settings.noise_multiplier, settings.delta
    one = epsilons(z, 1, delta, settings.sampling, q).zero_out
    if 0 < settings.max_epsilon < one:
        raise PrivacyError(
            f"nothing to audit: one round spends epsilon {plain(one)}, above "
            f"privacy.max-epsilon {settings.max_epsilon:g}, so nothing is ever released"
        )


def _check_sizes(num_clients: int, num_canaries: int, dimension: int) -> None:
    problems = []
    if num_clients < 2:
        problems.append(f"--clients: must be at least 2 (got {num_clients})")
    if num_canaries < 1:
        problems.append(f"--canaries: must be at least 1 (got {num_canaries})")
    elif dimension < 10 * num_canaries:
        problems.append(
            "--dimension: must be at least 10 times --canaries, or the canaries hide "
            f"each other (got {dimension} for {num_canaries})"
        )
    if problems:
        raise PrivacyError("\n".join(problems))
