"""What a run has spent of its privacy, and what it may still spend, for each unit.

A further unit of privacy is one class here and one line in `_ACCOUNTS`; its settings are
checked in `fedllm.config_rules`, and its noise is made by `fedllm.strategy` or the client.
"""

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Self

from fedllm.planning.advice import ledger_advice
from fedllm.planning.noise import privacy_settings
from fedllm.planning.record_noise import record_settings
from fedllm.privacy.chain import Head
from fedllm.privacy.ledger import Ledger, no_privacy
from fedllm.privacy.protected_record import relation
from fedllm.privacy.record_claims import RecordClaims
from fedllm.privacy.wording import plain, rounds_text
from fedllm.runs.checkpoint import require_unchanged
from fedllm.runs.directory import PRIVACY_FILE, read_json
from fedllm.server.account import (
    NO_PROTECTION,
    AccountTerms,
    LedgerAccount,
    LogLine,
    PrivacyAccount,
    delta_lines,
    follow_released_rounds,
    not_private,
    sealed_line,
    statement_lines,
)
from fedllm.server.joint_account import JointAccount
from fedllm.server.start_adapter import Earlier
from fedllm.strategy.round_stats import Round

logger = logging.getLogger(__name__)

_FEW_CLIENTS = 10


class ClientAccount(LedgerAccount[Ledger]):
    """Client level: the server adds the noise and keeps the ledger."""

    @classmethod
    def open(cls, terms: AccountTerms) -> Self:
        """Start the ledger of a new run, or load that of a resumed one.

        Raises:
            PrivacyError: The ledger cannot be trusted, or has other settings.
        """
        earlier = terms.earlier
        if terms.resumed:
            ledger = Ledger.load(terms.path)
            known = ledger.settings
            # The start adapter may be gone, and is not looked at again.
            earlier = Earlier(known.earlier_mu_squared, known.start_note)
        settings = privacy_settings(
            *(terms.config, terms.num_clients, terms.num_trainable),
            *(earlier.mu_squared, earlier.note),
            trustees=known.trustees if terms.resumed else terms.trustees,
        )
        if terms.resumed:
            ledger.check_same(settings)
        else:
            ledger = Ledger.create(terms.path, settings, terms.directory.path.name)
        follow_released_rounds(ledger, terms)
        return cls(ledger, terms.config.privacy.max_epsilon)

    def plan(self) -> list[LogLine]:
        """Return epsilon under both relations, the noise, and the ratio R."""
        settings = self._ledger.settings
        planned = self._ledger.epsilon_after(settings.planned_rounds)
        ratio = self._ledger.noise_to_signal
        before = ""
        if settings.earlier_mu_squared:
            spent = self._ledger.epsilon_after(0)
            before = f" with the runs before, which have spent {plain(spent.zero_out)},"
        lines = [
            (
                logging.INFO,
                f"privacy: {rounds_text(settings.planned_rounds)}{before} will spend epsilon "
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
        if settings.trustees:
            lines.append((logging.INFO, sealed_line(settings)))
        if planned.zero_out > NO_PROTECTION:
            lines.append((logging.WARNING, not_private(planned.zero_out)))
        lines += delta_lines(settings.delta, settings.population_size)
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
            *statement_lines(content),
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
        settings = replace(settings, start_note=terms.earlier.note)
        if terms.resumed:
            return cls(RecordClaims.load(terms.path, settings))
        name = terms.directory.path.name
        return cls(RecordClaims.create(terms.path, settings, name))

    @property
    def releases(self) -> list[int]:
        """The rounds in which a client sent an update."""
        return self.claims.releases

    @property
    def head(self) -> Head | None:
        """The end of the chain of rounds; None: an older version began it."""
        return self.claims.head

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
                f"{rounds_text(settings.planned_rounds)} spend at most epsilon "
                f"{plain(settings.target_epsilon)} on any of its records "
                f"({relation(settings.person_column)}) at delta {settings.delta:g}; largest "
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
        if settings.target_epsilon > NO_PROTECTION:
            lines.append((logging.WARNING, not_private(settings.target_epsilon)))
        return lines + delta_lines(settings.delta, None)

    def outcome(self) -> list[str]:
        """Return the reported epsilons, the statement, and what it leaves out."""
        claims = self.claims
        return [
            f"epsilon: {plain(claims.worst)} for the worst client, "
            f"{plain(claims.median)} for the median one, "
            f"{relation(claims.settings.person_column)}, at delta {claims.settings.delta:g}, as the clients report",
            *statement_lines(claims.as_dict()),
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
    if terms.config.is_joint:
        return JointAccount.open(terms)
    return _ACCOUNTS[terms.config.privacy.unit].open(terms)
