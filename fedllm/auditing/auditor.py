"""The audit of client-level privacy: deterministic checks, statistical checks, canaries.

Every check runs rounds of the strategy that `make_strategy` makes for the settings of a
run, on a toy adapter and without a base model. Its result holds for the code that runs here,
and not for a server that runs other code.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from fedllm.auditing.canary_clients import Findings, run_canaries
from fedllm.auditing.deterministic_checks import (
    denominator,
    ledger,
    sensitivity,
    weights,
)
from fedllm.auditing.grid_checks import checkpoint_moments, published_values
from fedllm.auditing.harness import Finding, MakeStrategy, NotAsPromisedError, Setup
from fedllm.auditing.statistical_checks import (
    fresh_noise,
    noise_scale,
    order,
    secret_coins,
)
from fedllm.config import RunConfig
from fedllm.errors import PrivacyError
from fedllm.privacy.accounting import epsilons
from fedllm.privacy.ledger import PrivacySettings
from fedllm.privacy.wording import plain
from fedllm.strategy.build import make_strategy

_MOST_REHEARSED = 10
# An estimate that exceeds its expectation by so many standard deviations is not chance.
_SIGMAS = 6.0


@dataclass(frozen=True)
class Check:
    """One line of an audit.

    Attributes:
        name: Name of the check.
        passed: Whether it holds.
        text: Its result, with numbers.
    """

    name: str
    passed: bool
    text: str


@dataclass(frozen=True)
class Audit:
    """The result of an audit.

    Attributes:
        checks: The checks, in the order in which they ran.
        rehearsal: The canaries of the whole run; None if it could not be rehearsed.
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
        settings: The settings that the run promises: z, C, delta and the rounds.
        num_clients: Honest clients of the rehearsal.
        num_canaries: Canary clients m.
        dimension: d of the toy adapter of noise checks and canaries.
        make: The function that makes the strategy.

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
        self._setup = Setup(config, settings, dimension, make)
        self._num_clients = num_clients
        self._num_canaries = num_canaries
        self._rehearsal: Findings | None = None

    def run(self, report: Callable[[Check], None] = lambda check: None) -> Audit:
        """Run all checks.

        Args:
            report: Called with each check when it is done.
        """
        checks = []
        for name, check in self.checks().items():
            checks.append(_checked(name, check))
            report(checks[-1])
        return Audit(checks, self._rehearsal)

    def check(self, name: str) -> Check:
        """Run one of the checks."""
        return _checked(name, self.checks()[name])

    def checks(self) -> dict[str, Callable[[], Finding]]:
        """Return the checks by name, in their order."""
        setup = self._setup
        checks: dict[str, Callable[[], Finding]] = {
            "sensitivity": lambda: sensitivity(setup),
            "weights": lambda: weights(setup),
            "denominator": lambda: denominator(setup),
            "noise scale": lambda: noise_scale(setup),
            "fresh noise": lambda: fresh_noise(setup),
            "order": lambda: order(setup),
            "published values": lambda: published_values(setup),
            "checkpoint moments": lambda: checkpoint_moments(setup),
            "ledger": lambda: ledger(setup),
        }
        if setup.settings.sampling == "poisson":
            checks["secret coins"] = lambda: secret_coins(setup)
        checks["canaries, one release"] = self._one_release
        checks["canaries, the run"] = self._whole_run
        return checks

    def _one_release(self) -> Finding:
        return self._compared(self._canaries(1, honest=False))

    def _whole_run(self) -> Finding:
        rounds = min(self._setup.settings.planned_rounds, _MOST_REHEARSED)
        self._rehearsal = self._canaries(rounds, honest=True)
        return self._compared(self._rehearsal)

    def _canaries(self, num_rounds: int, honest: bool) -> Findings:
        clients = self._num_clients + self._num_canaries
        with self._setup.bench(self._setup.dimension, clients) as bench:
            return run_canaries(bench, self._num_canaries, num_rounds, honest)

    def _compared(self, findings: Findings) -> Finding:
        """Compare the canaries' bound and estimate with the ledger."""
        passed = findings.certified.epsilon <= findings.accounted
        text = (
            f"{findings.rounds} round{'s' if findings.rounds > 1 else ''} of "
            f"{self._setup.settings.planned_rounds}: epsilon {plain(findings.accounted)} "
            f"accounted, at least {findings.certified.epsilon:.2f} certified "
            f"({findings.certified.num_correct} of {findings.certified.num_guesses} guesses "
            f"right)"
        )
        estimate = findings.estimate
        if estimate is None:
            return passed, text
        excess = (estimate.mu - findings.expected_mu) / estimate.mu_stddev
        return passed and excess < _SIGMAS, (
            f"{text}, {estimate.epsilon:.2f} estimated ({estimate.low:.2f} to "
            f"{estimate.high:.2f})"
        )


def _checked(name: str, check: Callable[[], Finding]) -> Check:
    try:
        passed, text = check()
    except NotAsPromisedError as error:
        passed, text = False, str(error)
    except Exception as error:  # noqa: BLE001 - an error is a finding
        passed, text = False, f"{type(error).__name__}: {error}"
    return Check(name, passed, text)


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
