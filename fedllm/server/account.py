"""What the rounds of a run ask about its privacy, whatever the unit."""

import logging
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Self, TypeVar

from fedllm.config import RunConfig
from fedllm.privacy.chain import Head
from fedllm.privacy.joint_ledger import JointLedger, JointSettings
from fedllm.privacy.ledger import Ledger, PrivacySettings
from fedllm.privacy.released_rounds import ReleasedRounds
from fedllm.privacy.wording import BANDS, delta_caution, plain
from fedllm.runs.directory import PRIVACY_FILE, RunDirectory
from fedllm.server.start_adapter import NOTHING, Earlier
from fedllm.strategy.round_stats import Round

logger = logging.getLogger(__name__)

LogLine = tuple[int, str]
"""A level of `logging`, and the text."""

NO_PROTECTION = BANDS[-2][0]
"""An epsilon above this is called no protection."""


@dataclass(frozen=True)
class AccountTerms:
    """What an account is opened for.

    Attributes:
        config: The run config; `privacy.unit` chooses the account.
        directory: The run folder, which holds privacy.json.
        num_clients: Population size N.
        num_trainable: Trained values d.
        resumed: Whether the run was begun before.
        home: fedllm's folder, where the released rounds are kept too; None: they are
            not, and the run cannot be resumed.
        declared_rows: The rows that each client declared, in the order of the population;
            empty if they were not asked.
        earlier: What the runs before have spent, from whose adapter a new run starts.
        trustees: How many open the rounds of a sealed run; 0: it is not sealed.
    """

    config: RunConfig
    directory: RunDirectory
    num_clients: int
    num_trainable: int
    resumed: bool
    home: Path | None
    declared_rows: Sequence[int] = ()
    earlier: Earlier = NOTHING
    trustees: int = 0

    @property
    def path(self) -> Path:
        """The run's privacy.json."""
        return self.directory.path / PRIVACY_FILE


class PrivacyAccount(ABC):
    """What the rounds of a run ask about its privacy, whatever the unit.

    Attributes:
        run: Name of the run, which privacy.json has too.
    """

    run: str

    @classmethod
    @abstractmethod
    def open(cls, terms: AccountTerms) -> Self:
        """Start privacy.json of a new run, or load that of a resumed one.

        Raises:
            ConfigError: The run began with another unit.
            PrivacyError: The file cannot be trusted, or has other settings.
        """

    @property
    def ledger(self) -> Ledger | JointLedger | None:
        """The ledger that the strategy pays each release into, if it adds the noise."""
        return None

    @property
    @abstractmethod
    def releases(self) -> list[int]:
        """The rounds that were paid for."""

    @property
    def head(self) -> Head | None:
        """The end of the ledger's chain; None: it has none."""
        return None

    def may_start(self, server_round: int, last_round: int) -> bool:
        """Return whether the budget allows a round after `last_round`; log why not."""
        return True

    def note_round(
        self, server_round: int, stats: Round, population: Sequence[int]
    ) -> None:
        """Write what a round has spent to disk, unless the strategy has done so."""
        return  # The strategy has, unless an account says otherwise.

    def is_exhausted(self, server_round: int, stats: Round) -> bool:
        """Return whether no client has budget left after a round; log it."""
        return False

    @abstractmethod
    def epsilon(self, server_round: int) -> float | None:
        """Return the epsilon after a round for metrics.jsonl; None: not bounded."""

    @abstractmethod
    def epsilon_text(self) -> str | None:
        """Return the epsilon for a round's log line; None: there is none."""

    @abstractmethod
    def plan(self) -> list[LogLine]:
        """Return what the planned rounds will spend, for the log before round 1."""

    @abstractmethod
    def outcome(self) -> list[str]:
        """Return what the run has spent and does not cover, for the end of the log."""

    @abstractmethod
    def advice(self) -> list[str]:
        """Return what helps a run that does not beat its base model."""


LedgerT = TypeVar("LedgerT", bound=Ledger | JointLedger)


class LedgerAccount(PrivacyAccount, Generic[LedgerT]):
    """The account of a run whose server adds the noise and keeps the ledger.

    Args:
        ledger: The run's ledger.
        max_epsilon: `privacy.max-epsilon`; 0.0: not set.
    """

    def __init__(self, ledger: LedgerT, max_epsilon: float) -> None:
        self._ledger = ledger
        self.run = ledger.run
        self._max_epsilon = max_epsilon

    @property
    def ledger(self) -> LedgerT:
        """The run's ledger."""
        return self._ledger

    @property
    def releases(self) -> list[int]:
        """The rounds that were paid for."""
        return self._ledger.releases

    @property
    def head(self) -> Head | None:
        """The end of the ledger's chain; None: an older version began it."""
        return self._ledger.head

    def may_start(self, server_round: int, last_round: int) -> bool:
        """Return whether a round stays within `privacy.max-epsilon`; log if not."""
        if self._ledger.may_spend(self._max_epsilon):
            return True
        logger.info(
            "round %d would pass privacy.max-epsilon %g: training stops here, and the "
            "adapter of round %d is kept",
            server_round,
            self._max_epsilon,
            last_round,
        )
        return False

    def epsilon(self, server_round: int) -> float | None:
        """Return the epsilon that was spent by the end of a round, by the unit's relation."""
        return self._ledger.spent if server_round else 0.0

    def epsilon_text(self) -> str | None:
        """Return that epsilon for a round's log line."""
        return f"epsilon {plain(self._ledger.spent)}"


def follow_released_rounds(ledger: Ledger | JointLedger, terms: AccountTerms) -> None:
    """Let a ledger count what any copy of its run folder releases; log what it lacked.

    Raises:
        PrivacyError: The rounds that were released elsewhere cannot be read or written.
    """
    if terms.home is None:
        return
    released = ReleasedRounds(terms.home, ledger.run)
    if not terms.resumed:
        released.begin()
    if rounds := ledger.follow(released):
        logger.warning(
            "this run folder was copied, or put back from a backup: round %s was "
            "released since then, and counts as spent here too",
            ", ".join(map(str, rounds)),
        )


def sealed_line(settings: PrivacySettings | JointSettings) -> str:
    """Return whose noise a sealed run has, and against whom its epsilon is."""
    return (
        f"sealed: {settings.trustees} trustees open each round; the epsilon is against a "
        f"server with {settings.colluding} of them and all other clients; their noise "
        f"together is {settings.opened_noise:.4g} clipping norms"
    )


def not_private(epsilon: float) -> str:
    """Return the warning of a run whose epsilon protects nobody."""
    return f"epsilon {plain(epsilon)} is no protection to speak of: this run is not private"


def delta_lines(delta: float, units: int | None) -> list[LogLine]:
    """Return a warning if a delta makes the promise weaker than its epsilon says."""
    caution = delta_caution(delta, units)
    return [(logging.WARNING, f"privacy.delta: {caution}")] if caution else []


def statement_lines(content: dict[str, Any]) -> list[str]:
    """Return the two log lines of a privacy.json."""
    return [
        f"privacy: {content['statement']}",
        "not covered: " + "; ".join(content["not_covered"]),
    ]
