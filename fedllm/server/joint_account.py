"""The account of record level with one noise for the whole federation."""

import logging
from dataclasses import replace
from typing import Self

from fedllm.planning.joint_noise import joint_settings
from fedllm.privacy.joint_ledger import JointLedger
from fedllm.privacy.protected_record import relation
from fedllm.privacy.wording import plain
from fedllm.server.account import (
    NO_PROTECTION,
    AccountTerms,
    LedgerAccount,
    LogLine,
    delta_lines,
    follow_released_rounds,
    not_private,
    sealed_line,
    statement_lines,
)


class JointAccount(LedgerAccount[JointLedger]):
    """Record level: the server noises the sum of all clients, and keeps the ledger."""

    @classmethod
    def open(cls, terms: AccountTerms) -> Self:
        """Start the ledger of a new run, or load that of a resumed one.

        The rows that clients declared are those of the ledger if the run is resumed.

        Raises:
            ConfigError: The clients declared fewer rows than one expected batch.
            PrivacyError: The ledger cannot be trusted, or has other settings.
        """
        config, num_trainable = terms.config, terms.num_trainable
        if terms.resumed:
            ledger = JointLedger.load(terms.path)
            declared, trustees = ledger.settings.declared_rows, ledger.settings.trustees
            settings = joint_settings(config, declared, num_trainable, trustees)
            note = ledger.settings.start_note
            ledger.check_same(replace(settings, start_note=note))
        else:
            settings = joint_settings(
                *(config, terms.declared_rows, num_trainable, terms.trustees)
            )
            settings = replace(settings, start_note=terms.earlier.note)
            name = terms.directory.path.name
            ledger = JointLedger.create(terms.path, settings, name)
        follow_released_rounds(ledger, terms)
        return cls(ledger, config.privacy.max_epsilon)

    def plan(self) -> list[LogLine]:
        """Return the epsilon of a record, the noise, and the ratio R."""
        settings = self._ledger.settings
        planned = self._ledger.spent_after(settings.planned_rounds)
        column = settings.person_column
        rows = "persons" if column else "rows"
        lines = [
            (
                logging.INFO,
                f"privacy: {settings.planned_rounds} steps will spend epsilon "
                f"{plain(planned)} on each record ({relation(column)}) at delta "
                f"{settings.delta:g}; one noise for all {settings.total_rows} declared {rows}, "
                f"multiplier {settings.noise_multiplier:.4g}, largest gradient norm "
                f"{settings.max_grad_norm:g}, expected batch "
                f"{settings.expected_batch_size} (probability "
                f"{settings.sampling_probability:.3g})",
            ),
            (
                logging.INFO,
                f"noise to signal R = {self._ledger.noise_to_signal:.3g} "
                f"({settings.num_trainable} trained values, {settings.expected_batch_size} "
                "records a step)",
            ),
        ]
        if settings.trustees:
            lines.append((logging.INFO, sealed_line(settings)))
        if planned > NO_PROTECTION:
            lines.append((logging.WARNING, not_private(planned)))
        return lines + delta_lines(settings.delta, settings.total_rows)

    def outcome(self) -> list[str]:
        """Return epsilon, the statement, and what it leaves out."""
        return [
            f"epsilon: {plain(self._ledger.spent)} for each record, "
            f"{relation(self._ledger.settings.person_column)}, at delta "
            f"{self._ledger.settings.delta:g}",
            *statement_lines(self._ledger.as_dict()),
        ]

    def advice(self) -> list[str]:
        """Return what helps against the noise, best first."""
        return [
            "more rows in the federation, or larger batches (train.gradient-accumulation): "
            "noise is divided by the expected batch",
            "fewer steps (num-server-rounds), each with less noise for the same epsilon",
            "another strategy.server-learning-rate",
        ]
