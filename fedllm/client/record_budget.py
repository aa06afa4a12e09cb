"""One client's budget in one run: its plan, its limit, and its ledger on its own disk."""

import hashlib
import math
from collections.abc import Sequence
from pathlib import Path

from fedllm.config import RunConfig, flat
from fedllm.planning.record_noise import client_plan
from fedllm.privacy.record_ledger import RecordLedger, RecordPlan

_PLANNED_BY = (
    "num-server-rounds",
    "train.batch-size",
    "train.gradient-accumulation",
    "train.local-steps",
    "train.local-epochs",
    "privacy.target-epsilon",
    "privacy.noise-multiplier",
    "privacy.delta",
)


def ledger_folder(home: Path, run_id: int, simulated_partition: int | None) -> Path:
    """Return where a client's ledger lies.

    Args:
        home: fedllm's folder on the client's disk.
        run_id: Flower's id of the run.
        simulated_partition: Which virtual client this is; None for a real one. Real
            clients of one machine share a ledger, which knows each row by its hash
            wherever the file lies; virtual ones begin anew in every run.
    """
    ledgers = home / "ledgers"
    if simulated_partition is None:
        return ledgers / "own"
    return ledgers / "simulated" / str(run_id) / str(simulated_partition)


class RecordBudget:
    """What a client may still spend on the records it holds, and what it has spent.

    Guarantee:
        The limit is the smallest of the node's own `max-epsilon` and the run's
        `privacy.max-epsilon`, else `privacy.target-epsilon`; the noise is calibrated to
        no more than it. A run's plan is fixed in its first round, kept on disk, and
        holds although rows come or go.

    Args:
        ledger: The client's ledger.
        config: The run config.
        run_id: Flower's id of the run.
        digests: `row_digest` of every row that the client holds.
        num_records: Rows that can be trained on.
        floor: The node's own `max-epsilon`; None: not set.

    Raises:
        ConfigError: There are fewer records than one expected batch.
        PrivacyError: The ledger cannot be trusted.
    """

    def __init__(
        self,
        ledger: RecordLedger,
        config: RunConfig,
        run_id: int,
        digests: Sequence[bytes],
        num_records: int,
        floor: float | None,
    ) -> None:
        privacy = config.privacy
        asked = privacy.max_epsilon or privacy.target_epsilon or math.inf
        self._limit = min(asked, math.inf if floor is None else floor)
        self._ledger = ledger
        self._digests = digests
        target = privacy.target_epsilon
        if target > 0:
            target = min(target, self._limit)
        run = _run_name(config, run_id, target)
        self.plan: RecordPlan = ledger.plan(run) or ledger.remember_plan(
            run, client_plan(config, num_records, target)
        )

    def require(self) -> None:
        """Refuse a round that would pass the limit, before training.

        Raises:
            BudgetError: It would.
        """
        plan = self.plan
        self._ledger.require(self._digests, plan.event, plan.delta, self._limit)

    def spend(self) -> float:
        """Pay for a round, on disk, before its adapter leaves; return the epsilon.

        Raises:
            BudgetError: It would pass the limit after all.
            PrivacyError: It cannot be written.
        """
        plan = self.plan
        return self._ledger.spend(self._digests, plan.event, plan.delta, self._limit)


def _run_name(config: RunConfig, run_id: int, target_epsilon: float) -> str:
    """Name a run with all that its plan depends on but the records."""
    settings = flat(config)
    parts = [run_id, target_epsilon, *(settings[key] for key in _PLANNED_BY)]
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]
