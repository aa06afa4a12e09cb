"""The ledger of a node: what every client-level run has promised it, in all runs together.

A run is charged whole, all rounds that it planned, with its first message and before anything
is trained; its later rounds cost nothing more, and rounds that it did not plan are refused. So
no refusal within a run depends on which rounds a node was drawn for.

The node counts what a run promises. It cannot see whether the server adds the noise.
"""

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from fedllm.errors import BudgetError, NodeError
from fedllm.privacy.accounting import Event, Sampling
from fedllm.privacy.composition import composed_epsilon
from fedllm.privacy.sealed_folder import SealedFolder
from fedllm.privacy.wording import plain

_EMPTY: Mapping[str, Any] = {"format": 1, "periods": [], "limits": None, "runs": {}}
_SECONDS_A_DAY = 86_400


@dataclass(frozen=True)
class Promise:
    """What a run promises a client that takes part in it.

    Attributes:
        unit: `client`. The sensitivity of a round's sum is the clipping norm.
        sampling: `all`, `fixed` or `poisson`.
        sampling_probability: q of each secret coin under `poisson`; else 1.0.
        noise_multiplier: z: the noise of a round over the clipping norm.
        rounds: The releases that it planned.
        delta: The run's own delta, which z was calibrated at.
    """

    unit: str
    sampling: Sampling
    sampling_probability: float
    noise_multiplier: float
    rounds: int
    delta: float


@dataclass(frozen=True)
class Limits:
    """What the node's owner allows.

    Attributes:
        max_epsilon: Largest zero-out epsilon of all runs of a period; None: only count.
        delta: Delta that all runs are composed at.
        period_days: Shortest length of a period; None: there is one, the lifetime.
    """

    max_epsilon: float | None
    delta: float
    period_days: float | None = None


@dataclass(frozen=True)
class Asked:
    """A message of a run.

    Attributes:
        run: Name of the run and its privacy settings.
        run_id: Flower's id of the run when it began.
        attempt: Flower's id of the run that asks, another one once it was resumed.
        server_round: The round; None: the run is announced, before any coin is tossed.
    """

    run: str
    run_id: int
    attempt: int
    server_round: int | None


@dataclass(frozen=True)
class ChargedRun:
    """A run in the ledger.

    Attributes:
        run: Its name.
        run_id: Flower's id of the run when it began.
        promise: What it promised.
        period: Number of the period that it was charged in, from 1.
        charged: When, in seconds since 1970, by this machine's clock.
        amplified: Whether it was charged before any coin was tossed, and so as sampled.
        attempts: Flower's ids of the run and of what resumed it, in order.
        rounds: The rounds that were asked for, in order; of an amplified run none is kept.
        ended: Whether the owner has ended it.
    """

    run: str
    run_id: int
    promise: Promise
    period: int
    charged: float
    amplified: bool
    attempts: tuple[int, ...] = ()
    rounds: tuple[int, ...] = ()
    ended: bool = False

    @property
    def event(self) -> Event:
        """What it costs: without amplification an ended run only the rounds it asked for."""
        promise = self.promise
        if self.amplified:
            probability, rounds = promise.sampling_probability, promise.rounds
        else:
            probability = 1.0
            rounds = len(self.rounds) if self.ended else promise.rounds
        return (promise.noise_multiplier, probability, rounds)


@dataclass(frozen=True)
class Account:
    """The whole ledger.

    Attributes:
        runs: Every run, the oldest first.
        began: When each period began, in seconds since 1970.
        limits: What the node's owner allowed at the latest charge; None: there was none.
    """

    runs: tuple[ChargedRun, ...]
    began: tuple[float, ...]
    limits: Limits | None

    @property
    def period(self) -> int:
        """Number of the period, from 1; 0 before the first charge."""
        return len(self.began)

    def events(self, period: int | None = None) -> list[Event]:
        """Return what the runs of a period cost; None: of the lifetime."""
        return [run.event for run in self.runs if period in (None, run.period)]

    def bounded_events(self, limits: Limits) -> list[Event]:
        """Return what counts against the owner's limit."""
        return self.events(None if limits.period_days is None else self.period)


class NodeLedger:
    """The ledger of one node, in a folder of its own.

    Guarantee:
        With `max_epsilon` the composition of all runs of a period, at the owner's delta, is
        at most that, if each run adds the noise that it promises: a run that would pass it
        is refused with its first message, and every later one. The charge is on disk before
        `charge` returns, and no two processes charge at a time. No clock ends a period.

    Args:
        folder: Made if there is none.

    Raises:
        ConfigError: Another user may write its place.
        PrivacyError: The ledger cannot be trusted or written.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = SealedFolder(folder, _EMPTY)

    @property
    def is_new(self) -> bool:
        """Whether it was begun just now."""
        return self._folder.is_new

    def account(self) -> Account:
        """Return all that the ledger holds."""
        with self._folder.locked() as content:
            return _account(content)

    def charge(
        self, asked: Asked, promise: Callable[[], Promise], limits: Limits
    ) -> bool:
        """Enter a message's run, unless it is there, and its round.

        Args:
            asked: The message.
            promise: Called for a run that is not known: to calibrate takes seconds under
                Poisson sampling.
            limits: The owner's, at present.

        Returns:
            Whether the run was charged now.

        Raises:
            BudgetError: The run, or this round of it, is beyond what may be spent; nothing
                was entered.
            PrivacyError: The ledger cannot be trusted or written.
        """
        with self._folder.locked() as content:
            account = _account(content)
            known = _find(account.runs, asked.run)
            is_new = known is None
            if known is None:
                account = _with_a_period(account)
                known = ChargedRun(
                    run=asked.run,
                    run_id=asked.run_id,
                    promise=promise(),
                    period=account.period,
                    charged=time.time(),
                    amplified=asked.server_round is None,
                )
                account = replace(account, runs=(*account.runs, known))
                _require_room(account, known, limits)
            elif limits != account.limits:
                _require_room(account, known, limits)
            _require_open(known, account.period)
            known = _advanced(known, asked)
            account = _with_run(replace(account, limits=limits), known)
            self._folder.write(_content(account))
        return is_new

    def renew(self, early: bool = False) -> Account:
        """Begin a new period: for the owner alone. Runs that are under way end.

        Args:
            early: Also before the period's days are over.

        Raises:
            NodeError: There is no period, or its days are not over.
        """
        with self._folder.locked() as content:
            account = _account(content)
            days = None if account.limits is None else account.limits.period_days
            if days is None:
                raise NodeError(
                    "no period to renew: no run was charged, or the node config has no "
                    "budget-period, and max-epsilon bounds the lifetime"
                )
            passed = (time.time() - account.began[-1]) / _SECONDS_A_DAY
            if passed < days and not early:
                raise NodeError(
                    f"period {account.period}: {passed:.1f} of its {days:g} days have "
                    "passed: --early renews it now"
                )
            account = replace(account, began=(*account.began, time.time()))
            self._folder.write(_content(account))
        return account

    def end(self, prefix: str) -> ChargedRun:
        """End a run, which gets no update any more, for the owner.

        Without amplification the rounds that it never asked for are given back. Under
        Poisson sampling that would tell which rounds the node was drawn for.

        Args:
            prefix: The first digits of its name.

        Raises:
            NodeError: No run, or more than one, begins so.
        """
        with self._folder.locked() as content:
            account = _account(content)
            runs = [
                run for run in account.runs if prefix and run.run.startswith(prefix)
            ]
            if len(runs) != 1:
                raise NodeError(
                    f"{prefix!r}: {len(runs)} runs begin so: fedllm node budget"
                )
            ended = replace(runs[0], ended=True)
            self._folder.write(_content(_with_run(account, ended)))
        return ended


def _require_room(account: Account, run: ChargedRun, limits: Limits) -> None:
    """Check that what is charged keeps the owner's limit.

    Raises:
        BudgetError: It does not.
    """
    if limits.max_epsilon is None:
        return
    events = account.bounded_events(limits)
    spent = composed_epsilon(events, limits.delta)
    if spent > limits.max_epsilon:
        span = "its lifetime" if limits.period_days is None else "this period"
        raise BudgetError(
            f"max-epsilon: run {run.run} and the others of {span} come to epsilon "
            f"{plain(spent)} at delta {limits.delta:g}, above this node's "
            f"{limits.max_epsilon:g}: fedllm node budget"
        )


def _require_open(run: ChargedRun, period: int) -> None:
    """Check that a run may still ask for updates.

    Raises:
        BudgetError: The owner has ended it, or its period.
    """
    if run.ended or run.period != period:
        ended = "it" if run.ended else f"period {run.period}, which it was charged in"
        raise BudgetError(
            f"run {run.run}: gets no update any more: this node's owner ended {ended}"
        )


def _advanced(run: ChargedRun, asked: Asked) -> ChargedRun:
    """Return a run with one more message.

    Rounds of a run go forward. A resumed one may repeat the round that was cut off, whose
    noise was never published; one that begins earlier, or an attempt that was resumed and
    goes on all the same, is a second run from a copy of the server's folder.

    Raises:
        BudgetError: The round was not planned, or another run has released it.
    """
    is_new = asked.attempt not in run.attempts
    if not is_new and asked.attempt != run.attempts[-1]:
        raise BudgetError(
            f"run {run.run}: was resumed as {run.attempts[-1]}, and {asked.attempt} asks "
            "all the same: a second run that nobody charged"
        )
    attempts = (*run.attempts, asked.attempt) if is_new else run.attempts
    server_round = asked.server_round
    if server_round is None:
        return replace(run, attempts=attempts)
    if not 1 <= server_round <= run.promise.rounds:
        raise BudgetError(
            f"run {run.run}: round {server_round}: {run.promise.rounds} were planned and "
            "charged"
        )
    if run.amplified:
        # Which rounds a node was drawn for may not decide a refusal, and is not kept.
        return replace(run, attempts=attempts)
    last = max(run.rounds, default=0)
    if is_new and server_round < last:
        raise BudgetError(
            f"run {run.run}: resumes at round {server_round}, and round {last} was "
            "answered: a second run, from a copy of its folder, that nobody charged"
        )
    rounds = tuple(sorted({*run.rounds, server_round}))
    return replace(run, attempts=attempts, rounds=rounds)


def _find(runs: Iterable[ChargedRun], name: str) -> ChargedRun | None:
    return next((run for run in runs if run.run == name), None)


def _with_a_period(account: Account) -> Account:
    """Return the account with its first period begun."""
    return account if account.began else replace(account, began=(time.time(),))


def _with_run(account: Account, run: ChargedRun) -> Account:
    """Return the account with a run in the place of what was known of it."""
    runs = tuple(run if known.run == run.run else known for known in account.runs)
    return replace(account, runs=runs)


def _account(content: Mapping[str, Any]) -> Account:
    limits = content["limits"]
    runs = []
    for name, entry in content["runs"].items():
        kept = {
            **entry,
            "promise": Promise(**entry["promise"]),
            "attempts": tuple(entry["attempts"]),
            "rounds": tuple(entry["rounds"]),
        }
        runs.append(ChargedRun(run=name, **kept))
    return Account(
        tuple(sorted(runs, key=lambda run: run.charged)),
        tuple(content["periods"]),
        None if limits is None else Limits(**limits),
    )


def _content(account: Account) -> dict[str, Any]:
    runs = {run.run: asdict(run) for run in account.runs}
    for entry in runs.values():
        del entry["run"]
    return {
        **_EMPTY,
        "periods": list(account.began),
        "limits": None if account.limits is None else asdict(account.limits),
        "runs": runs,
    }
