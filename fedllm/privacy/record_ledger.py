"""The record ledger of a client: what it has released in all runs, on its own disk.

Every release counts against every record, whether the client held it at the time or not. So
what is spent, and when the client stops, is a function of the plans of its runs and of nothing
that a row holds: neither tells whether a certain row was there, and no edit, copy or new export
of the rows begins a budget anew. A row that came later is counted with what was spent before it.

So no id of a person is in it either, hashed or not: every release counts against every person,
and a person whose rows change stays the one that they were.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from fedllm.errors import BudgetError, ConfigError
from fedllm.privacy.accounting import Event, calibrate, default_delta, record_epsilon
from fedllm.privacy.sealed_folder import SealedFolder
from fedllm.privacy.wording import plain

_EMPTY: Mapping[str, Any] = {"format": 2, "plans": {}, "releases": []}

Unit = Literal["row", "person"]
"""What is added or removed: one row, or all rows of one person."""


@dataclass(frozen=True)
class RecordPlan:
    """A client's noise and batches for every round of one run, fixed in its first round.

    Attributes:
        noise_multiplier: z: the noise of a step over the largest norm of one gradient.
        sampling_probability: q of each record at each step.
        steps: Steps in one round.
        expected_batch_size: The divisor of each step's sum.
        delta: Delta of the epsilon that the client reports.
    """

    noise_multiplier: float
    sampling_probability: float
    steps: int
    expected_batch_size: int
    delta: float

    @property
    def event(self) -> Event:
        """The releases of one round."""
        return (self.noise_multiplier, self.sampling_probability, self.steps)


def make_plan(
    num_records: int,
    expected_batch_size: int,
    steps: int,
    num_rounds: int,
    target_epsilon: float,
    noise_multiplier: float,
    delta: float,
) -> RecordPlan:
    """Calibrate a client's noise for all rounds that it may take part in.

    Args:
        num_records: n, public by assumption; at least `expected_batch_size`.
        expected_batch_size: Of the Poisson batches; q is this over n.
        steps: Steps in one round.
        num_rounds: Rounds of the run.
        target_epsilon: The largest epsilon of all rounds together; 0.0: z is given.
        noise_multiplier: z, if there is no target.
        delta: 0.0: the smaller of 1e-5 and n^-1.1.
    """
    delta = delta or default_delta(num_records)
    probability = expected_batch_size / num_records
    if target_epsilon > 0:
        releases = num_rounds * steps
        noise_multiplier = calibrate(
            target_epsilon, releases, delta, "poisson", probability, "ADD_OR_REMOVE_ONE"
        )
    return RecordPlan(noise_multiplier, probability, steps, expected_batch_size, delta)


class RecordLedger:
    """The ledger of one client, in a folder of its own.

    Guarantee:
        An event is on disk, file and folder synced, before `spend` returns; no two
        processes spend at a time; a ledger that was edited, cut short, taken from
        another folder or lost raises an error. A ledger is of one unit: what was released
        with a row as the unit does not bound a person with several rows, and a release
        with the person as the unit bounds a row only as a replaced one. Not covered: an
        owner who deletes the whole folder, or puts an older copy of it back.

    Args:
        folder: Made, with a fresh key and an empty ledger, if there is none.
        unit: What its epsilon is of.

    Raises:
        ConfigError: Another user may write its place, or it has releases of the other unit.
        PrivacyError: The ledger cannot be trusted or written.
    """

    def __init__(self, folder: Path, unit: Unit = "row") -> None:
        self._folder = SealedFolder(folder, _EMPTY)
        self._unit: Unit = unit
        with self._folder.locked() as content:
            self._require_unit(content)

    @property
    def is_new(self) -> bool:
        """Whether it was begun just now."""
        return self._folder.is_new

    def plan(self, run: str) -> RecordPlan | None:
        """Return the plan of a run that this client already takes part in.

        Args:
            run: Identifier of the run and its privacy settings.
        """
        with self._folder.locked() as content:
            known = content["plans"].get(run)
        return None if known is None else RecordPlan(**known)

    def remember_plan(self, run: str, plan: RecordPlan) -> RecordPlan:
        """Store a run's plan unless there is one; return the plan that holds."""
        with self._folder.locked() as content:
            known = content["plans"].get(run)
            if known is not None:
                return RecordPlan(**known)
            self._require_unit(content)
            content["plans"][run] = asdict(plan)
            self._write(content)
        return plan

    def epsilon(self, delta: float, event: Event | None = None) -> float:
        """Return the epsilon of all releases together, add-or-remove of one record.

        Args:
            delta: In (0, 1).
            event: One more release.
        """
        with self._folder.locked() as content:
            return record_epsilon(_releases(content, event), delta)

    def require(self, event: Event, delta: float, limit: float) -> None:
        """Raise if a release would pass a limit, before anything is computed.

        Raises:
            BudgetError: The release would pass the limit.
        """
        _require_at_most(self.epsilon(delta, event), limit)

    def spend(self, event: Event, delta: float, limit: float) -> float:
        """Enter a release.

        Args:
            event: The release.
            delta: In (0, 1).
            limit: Largest epsilon that may be spent.

        Returns:
            The epsilon of all releases, this one included.

        Raises:
            BudgetError: The release would pass the limit; nothing was entered.
            PrivacyError: The ledger cannot be trusted or written; then nothing may be
                released.
        """
        with self._folder.locked() as content:
            self._require_unit(content)
            content["releases"] = _releases(content, event)
            spent = record_epsilon(content["releases"], delta)
            _require_at_most(spent, limit)
            self._write(content)
        return spent

    def _require_unit(self, content: Mapping[str, Any]) -> None:
        """Check, with the lock held, that what was released had the same unit.

        Raises:
            ConfigError: It had not.
        """
        # A ledger of rows has no entry, as from before there were persons.
        counted = content.get("unit", "row")
        if content["releases"] and counted != self._unit:
            raise ConfigError(
                f"data.person-column: this client's ledger counts releases with one {counted} "
                f"as the unit, which is no bound for one {self._unit}: use another "
                "FEDLLM_HOME for rows that no earlier run had, or the unit of before"
            )

    def _write(self, content: dict[str, Any]) -> None:
        content.pop("unit", None)
        if self._unit != "row":
            content["unit"] = self._unit
        self._folder.write(content)


def _releases(content: Mapping[str, Any], event: Event | None) -> list[Event]:
    """Return all releases, equal ones together, with one more added."""
    counts = {(float(z), float(q)): int(n) for z, q, n in content["releases"]}
    if event is not None:
        z, q, count = event
        counts[z, q] = counts.get((z, q), 0) + count
    return [(z, q, n) for (z, q), n in sorted(counts.items())]


def _require_at_most(spent: float, limit: float) -> None:
    """Raise if an epsilon passes a limit.

    Raises:
        BudgetError: It passes the limit.
    """
    if spent > limit:
        raise BudgetError(
            f"privacy.max-epsilon: one more round would bring this client's records to epsilon "
            f"{plain(spent)}, above the {limit:g} that may be spent on them in all runs"
        )
