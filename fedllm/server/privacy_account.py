"""What a run has spent of its privacy, and what it may still spend, for each unit.

A further unit of privacy is one class here and one line in `_ACCOUNTS`; its settings are
checked in `fedllm.config`, and its noise is made by `fedllm.strategy` or the client.
"""

import logging
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from fedllm.config import RunConfig
from fedllm.planning.advice import ledger_advice
from fedllm.planning.noise import privacy_settings
from fedllm.planning.record_noise import record_settings
from fedllm.privacy.accounting import noise_to_signal
from fedllm.privacy.ledger import Ledger, no_privacy
from fedllm.privacy.record_claims import RecordClaims
from fedllm.privacy.released_rounds import ReleasedRounds
from fedllm.privacy.wording import BANDS, delta_caution, plain
from fedllm.runs.checkpoint import require_unchanged
from fedllm.runs.directory import PRIVACY_FILE, RunDirectory, read_json
from fedllm.strategy.round_stats import Round

logger = logging.getLogger(__name__)

LogLine = tuple[int, str]
"""A level of `logging`, and the text."""

_FEW_CLIENTS = 10
_NO_PROTECTION = BANDS[-2][0]
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
    """

    config: RunConfig
    directory: RunDirectory
    num_clients: int
    num_trainable: int
    resumed: bool
    home: Path | None

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
    def ledger(self) -> Ledger | None:
        """The client-level ledger that the strategy pays each release into, if any."""
        return None

    @property
    @abstractmethod
    def releases(self) -> list[int]:
        """The rounds that were paid for."""

    def may_start(self, server_round: int, last_round: int) -> bool:
        """Return whether the budget allows a round after `last_round`; log why not."""
        return True

    def note_round(  # noqa: B027 - nothing to write if the strategy has paid
        self, server_round: int, stats: Round, population: Sequence[int]
    ) -> None:
        """Write what a round has spent to disk, unless the strategy has done so."""

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


class ClientAccount(PrivacyAccount):
    """Client level: the server adds the noise and keeps the ledger."""

    def __init__(self, ledger: Ledger, max_epsilon: float) -> None:
        self._ledger = ledger
        self.run = ledger.run
        self._max_epsilon = max_epsilon

    @classmethod
    def open(cls, terms: AccountTerms) -> Self:
        """Start the ledger of a new run, or load that of a resumed one.

        Raises:
            PrivacyError: The ledger cannot be trusted, or has other settings.
        """
        settings = privacy_settings(
            terms.config, terms.num_clients, terms.num_trainable
        )
        if terms.resumed:
            ledger = Ledger.load(terms.path)
            ledger.check_same(settings)
        else:
            ledger = Ledger.create(terms.path, settings, terms.directory.path.name)
        if terms.home is not None:
            released = ReleasedRounds(terms.home, ledger.run)
            if not terms.resumed:
                released.begin()
            _log_released_elsewhere(ledger.follow(released))
        return cls(ledger, terms.config.privacy.max_epsilon)

    @property
    def ledger(self) -> Ledger:
        """The run's ledger."""
        return self._ledger

    @property
    def releases(self) -> list[int]:
        """The rounds that were paid for."""
        return self._ledger.releases

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
        """Return the zero-out epsilon that was spent by the end of a round."""
        return self._ledger.epsilons().zero_out if server_round else 0.0

    def epsilon_text(self) -> str | None:
        """Return the zero-out epsilon for a round's log line."""
        return f"epsilon {plain(self._ledger.epsilons().zero_out)}"

    def plan(self) -> list[LogLine]:
        """Return epsilon under both relations, the noise, and the ratio R."""
        settings = self._ledger.settings
        planned = self._ledger.epsilon_after(settings.planned_rounds)
        ratio = noise_to_signal(
            settings.noise_multiplier,
            settings.num_trainable,
            settings.num_sampled_clients,
        )
        lines = [
            (
                logging.INFO,
                f"privacy: {settings.planned_rounds} rounds will spend epsilon "
                f"{plain(planned.zero_out)} zero-out ({plain(planned.replace_one)} "
                f"replace-one) at delta {settings.delta:g}; noise multiplier "
                f"{settings.noise_multiplier:.4g}, clipping norm "
                f"{settings.clipping_norm:g}",
            ),
            (
                logging.INFO,
                f"noise to signal R = {ratio:.3g} ({settings.num_trainable} trained "
                f"values, {settings.num_sampled_clients:g} clients a round)",
            ),
        ]
        if planned.zero_out > _NO_PROTECTION:
            lines.append((logging.WARNING, _not_private(planned.zero_out)))
        lines += _delta_lines(settings.delta, settings.population_size)
        if settings.population_size < _FEW_CLIENTS:
            lines.append(
                (
                    logging.WARNING,
                    f"with {settings.population_size} clients the noise of each round "
                    f"is divided by {settings.num_sampled_clients:g} only, which is "
                    'heavy; --federation-config "num-supernodes=20" makes a simulation '
                    "of 20",
                )
            )
        return lines

    def outcome(self) -> list[str]:
        """Return epsilon under both relations, the statement, and what it leaves out."""
        spent, content = self._ledger.epsilons(), self._ledger.as_dict()
        return [
            f"epsilon: {plain(spent.zero_out)} zero-out, {plain(spent.replace_one)} "
            f"replace-one, at delta {self._ledger.settings.delta:g}",
            *_statement(content),
        ]

    def advice(self) -> list[str]:
        """Return what helps against the noise, best first."""
        return ledger_advice(self._ledger)


class RecordAccount(PrivacyAccount):
    """Record level: each client adds noise itself and reports what it has spent."""

    def __init__(self, claims: RecordClaims) -> None:
        self.run = claims.run
        self.claims = claims

    @classmethod
    def open(cls, terms: AccountTerms) -> Self:
        """Start the list of claims of a new run, or load that of a resumed one.

        Raises:
            PrivacyError: The list cannot be trusted, or has other settings.
        """
        settings = record_settings(terms.config, terms.num_clients, terms.num_trainable)
        if terms.resumed:
            return cls(RecordClaims.load(terms.path, settings))
        name = terms.directory.path.name
        return cls(RecordClaims.create(terms.path, settings, name))

    @property
    def releases(self) -> list[int]:
        """The rounds in which a client sent an update."""
        return self.claims.releases

    def note_round(
        self, server_round: int, stats: Round, population: Sequence[int]
    ) -> None:
        """Write what each client reports to disk."""
        self.claims.note_round(server_round, stats.epsilons, population)

    def is_exhausted(self, server_round: int, stats: Round) -> bool:
        """Return whether every client answered that its budget is spent; log it."""
        if not stats.all_spent:
            return False
        logger.info(
            "round %d: every client has spent its budget: training stops here",
            server_round,
        )
        return True

    def epsilon(self, server_round: int) -> float | None:
        """Return the largest epsilon that a client has reported."""
        return self.claims.worst if server_round else 0.0

    def epsilon_text(self) -> str | None:
        """Return the worst client's epsilon for a round's log line."""
        return f"epsilon {plain(self.claims.worst)} (worst client)"

    def plan(self) -> list[LogLine]:
        """Return what a record may lose in the planned rounds, and who ensures it."""
        settings = self.claims.settings
        if settings.target_epsilon > 0:
            text = (
                "privacy: each client calibrates its own noise, so that "
                f"{settings.planned_rounds} rounds spend at most epsilon "
                f"{plain(settings.target_epsilon)} on any of its records "
                f"(add-or-remove one record) at delta {settings.delta:g}; largest "
                f"gradient norm {settings.max_grad_norm:g}"
            )
        else:
            text = (
                f"privacy: noise multiplier {settings.noise_multiplier:.4g} on each "
                "client; what it spends on a record depends on how many it has, and "
                "each client reports it; largest gradient norm "
                f"{settings.max_grad_norm:g}"
            )
        lines = [(logging.INFO, text)]
        if settings.max_epsilon > 0:
            lines.append(
                (
                    logging.INFO,
                    "a client stops before its releases have spent epsilon "
                    f"{plain(settings.max_epsilon)} in all runs together",
                )
            )
        if settings.target_epsilon > _NO_PROTECTION:
            lines.append((logging.WARNING, _not_private(settings.target_epsilon)))
        return lines + _delta_lines(settings.delta, None)

    def outcome(self) -> list[str]:
        """Return the reported epsilons, the statement, and what it leaves out."""
        claims = self.claims
        return [
            f"epsilon: {plain(claims.worst)} for the worst client, "
            f"{plain(claims.median)} for the median one, add-or-remove one record, at "
            f"delta {claims.settings.delta:g}, as the clients report",
            *_statement(claims.as_dict()),
        ]

    def advice(self) -> list[str]:
        """Return what helps against the clients' noise."""
        return [
            "more records on each client, or larger batches of them "
            "(train.gradient-accumulation): noise is divided by the size of a batch",
            "fewer steps or rounds, each with less noise for the same epsilon",
            "another train.learning-rate",
        ]


class NoAccount(PrivacyAccount):
    """No privacy: nothing is spent, since nothing is bounded."""

    def __init__(self, run: str) -> None:
        self.run = run

    @classmethod
    def open(cls, terms: AccountTerms) -> Self:
        """Write privacy.json of a new run, or check that of a resumed one.

        Raises:
            ConfigError: The run began with privacy.
        """
        if not terms.resumed:
            run = terms.directory.path.name
            content = no_privacy(terms.num_clients, terms.num_trainable, run)
            terms.directory.write_json(PRIVACY_FILE, content)
            return cls(run)
        content = read_json(terms.path)
        require_unchanged(
            {"privacy.unit": content.get("unit")},
            {"privacy.unit": terms.config.privacy.unit},
            "resume.from: the run's ledger and config differ",
        )
        return cls(str(content.get("run", "")))

    @property
    def releases(self) -> list[int]:
        """No round is paid for."""
        return []

    def epsilon(self, server_round: int) -> float | None:
        """Return None: epsilon is not bounded."""
        return None

    def epsilon_text(self) -> str | None:
        """Return None: there is no epsilon to show."""
        return None

    def plan(self) -> list[LogLine]:
        """Return nothing; the end of the log says that there was no noise."""
        return []

    def outcome(self) -> list[str]:
        """Return that nothing is protected."""
        return ["privacy: none: no noise was added, and epsilon is not bounded"]

    def advice(self) -> list[str]:
        """Return what helps a run without noise."""
        return ledger_advice(None)


_ACCOUNTS: dict[str, type[PrivacyAccount]] = {
    "client": ClientAccount,
    "record": RecordAccount,
    "none": NoAccount,
}


def open_account(terms: AccountTerms) -> PrivacyAccount:
    """Start the privacy account of a new run, or load that of a resumed one.

    Raises:
        ConfigError: The run began with another unit.
        PrivacyError: The account cannot be trusted, or has other settings.
    """
    return _ACCOUNTS[terms.config.privacy.unit].open(terms)


def _log_released_elsewhere(rounds: Sequence[int]) -> None:
    """Log which rounds a copied or put back run folder does not know of."""
    if rounds:
        logger.warning(
            "this run folder was copied, or put back from a backup: round %s was "
            "released since then, and counts as spent here too",
            ", ".join(map(str, rounds)),
        )


def _not_private(epsilon: float) -> str:
    return f"epsilon {plain(epsilon)} is no protection to speak of: this run is not private"


def _delta_lines(delta: float, units: int | None) -> list[LogLine]:
    """Return a warning if a delta makes the promise weaker than its epsilon says."""
    caution = delta_caution(delta, units)
    return [(logging.WARNING, f"privacy.delta: {caution}")] if caution else []


def _statement(content: dict[str, Any]) -> list[str]:
    """Return the two log lines of a privacy.json."""
    return [
        f"privacy: {content['statement']}",
        "not covered: " + "; ".join(content["not_covered"]),
    ]
