"""The record ledger of a client: what it has released in all runs, on its own disk.

Every release counts against every record, whether the client held it at the time or not. So
what is spent, and when the client stops, is a function of the plans of its runs and of nothing
that a row holds: neither tells whether a certain row was there, and no edit, copy or new export
of the rows begins a budget anew. A row that came later is counted with what was spent before it.
"""

import hashlib
import hmac
import json
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from fedllm.atomic_files import sync_folder, write_atomic, write_synced
from fedllm.errors import BudgetError, PrivacyError
from fedllm.privacy.accounting import Event, calibrate, default_delta, record_epsilon
from fedllm.privacy.wording import plain
from fedllm.strict_modes import make_strict_folder

_KEY_FILE = "key"
_LEDGER_FILE = "ledger.json"
_FORMAT = 2
_OWNER_ONLY = 0o600


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
        another folder or lost raises an error. Not covered: an owner who deletes the whole
        folder, or puts an older copy of it back.

    Args:
        folder: Made, with a fresh key and an empty ledger, if there is none.

    Raises:
        ConfigError: Another user may write its place.
        PrivacyError: The ledger cannot be trusted or written.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._path = folder / _LEDGER_FILE
        try:
            make_strict_folder(folder.parent)
            self._lock = FileLock(str(folder) + ".lock", mode=0o600)
            with self._lock:
                if not folder.exists():
                    self._create()
                self._key = self._read_key()
        except OSError as error:
            raise PrivacyError(
                f"{folder}: the ledger cannot be used: {error.strerror}; without it "
                "nothing may be released"
            ) from None

    def plan(self, run: str) -> RecordPlan | None:
        """Return the plan of a run that this client already takes part in.

        Args:
            run: Identifier of the run and its privacy settings.
        """
        with self._locked() as content:
            known = content["plans"].get(run)
        return None if known is None else RecordPlan(**known)

    def remember_plan(self, run: str, plan: RecordPlan) -> RecordPlan:
        """Store a run's plan unless there is one; return the plan that holds."""
        with self._locked() as content:
            known = content["plans"].get(run)
            if known is not None:
                return RecordPlan(**known)
            content["plans"][run] = asdict(plan)
            self._write(content)
        return plan

    def epsilon(self, delta: float, event: Event | None = None) -> float:
        """Return the epsilon of all releases together, add-or-remove of one record.

        Args:
            delta: In (0, 1).
            event: One more release.
        """
        with self._locked() as content:
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
        with self._locked() as content:
            content["releases"] = _releases(content, event)
            spent = record_epsilon(content["releases"], delta)
            _require_at_most(spent, limit)
            self._write(content)
        return spent

    @contextmanager
    def _locked(self) -> Iterator[dict[str, Any]]:
        """Hold the lock and yield the ledger's content."""
        with self._lock:
            yield self._read()

    def _create(self) -> None:
        """Make key and ledger together, never one without the other."""
        fresh = self._folder.with_name(f".{self._folder.name}-{secrets.token_hex(4)}")
        fresh.mkdir(mode=0o700)
        self._key = secrets.token_bytes(32)
        write_synced(fresh / _KEY_FILE, self._key, _OWNER_ONLY)
        empty = {"format": _FORMAT, "plans": {}, "releases": []}
        write_synced(fresh / _LEDGER_FILE, self._sealed(empty), _OWNER_ONLY)
        fresh.rename(self._folder)
        sync_folder(self._folder.parent)

    def _read_key(self) -> bytes:
        try:
            key = (self._folder / _KEY_FILE).read_bytes()
        except FileNotFoundError:
            key = b""
        if len(key) != 32:
            raise self._damaged("its key is missing or damaged")
        return key

    def _read(self) -> dict[str, Any]:
        """Return the ledger's content.

        Raises:
            PrivacyError: It is missing, or its signature does not match this folder's key.
        """
        try:
            outer = json.loads(self._path.read_text("utf-8"))
            content, seal = outer["content"], outer["seal"]
            valid = isinstance(seal, str) and hmac.compare_digest(
                seal.encode(), self._seal(content).encode()
            )
        except OSError as error:
            raise self._damaged(f"{error.strerror}") from None
        except (ValueError, KeyError, TypeError):
            raise self._damaged("it is cut short or not a ledger") from None
        if not valid or content.get("format") != _FORMAT:
            raise self._damaged("it was edited, or belongs to other data")
        return dict(content)

    def _write(self, content: Mapping[str, Any]) -> None:
        """Write the ledger whole, so that it survives a power cut."""
        try:
            write_atomic(self._path, self._sealed(content), _OWNER_ONLY)
        except OSError as error:
            raise PrivacyError(
                f"{self._path}: cannot be written: {error.strerror}; nothing is released"
            ) from None

    def _sealed(self, content: Mapping[str, Any]) -> bytes:
        outer = {"seal": self._seal(content), "content": content}
        return json.dumps(outer, allow_nan=False).encode()

    def _seal(self, content: Mapping[str, Any]) -> str:
        """Return the keyed hash of the whole content."""
        text = json.dumps(content, sort_keys=True, separators=(",", ":"))
        return hmac.new(
            self._key, b"ledger" + text.encode(), hashlib.sha256
        ).hexdigest()

    def _damaged(self, why: str) -> PrivacyError:
        return PrivacyError(
            f"{self._path}: the ledger cannot be trusted: {why}. Put back the folder's "
            "last state; moving it away forgets what was spent"
        )


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
