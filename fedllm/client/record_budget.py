"""One client's privacy budget in one run: its plan, its limit, its ledger on its disk.

A round is paid for after the training and before the reply, so that a training that fails
costs nothing and no adapter leaves unpaid. If the server adds the noise, a step is paid for
before its coins are tossed.
"""

import hashlib
import math
from collections.abc import Callable, Mapping
from pathlib import Path

from fedllm.client.log import ClientLog
from fedllm.client.node_config import NodeConfig
from fedllm.config import RunConfig, fedllm_home, flat
from fedllm.errors import ConfigError
from fedllm.planning.record_noise import client_plan
from fedllm.privacy.accounting import default_delta
from fedllm.privacy.record_ledger import RecordLedger, RecordPlan, Unit
from fedllm.wire.messages import NOISE_MULTIPLIER, TOTAL_ROWS

SMALLEST_NOISE = 1e-3
"""The smallest noise multiplier that a server may name: below, epsilon is in the thousands."""

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
    """Return the folder of a client's ledger.

    Args:
        home: fedllm's folder on the client's disk.
        run_id: Flower's id of the run.
        simulated_partition: Which virtual client this is; None for a real one. Real
            clients with one home share a ledger, since their files may hold the same
            rows; virtual ones start a new ledger in every run.
    """
    ledgers = home / "ledgers"
    if simulated_partition is None:
        return ledgers / "own"
    return ledgers / "simulated" / str(run_id) / str(simulated_partition)


class RecordBudget:
    """The budget of a client's records.

    Guarantee:
        The limit is the smallest of the node's own `max-epsilon` and the run's
        `privacy.max-epsilon`, else `privacy.target-epsilon`; the noise is calibrated to
        no more than that. A run's plan is fixed in its first round, kept on disk, and
        does not change if rows come or go. Plan, epsilon and what is refused are functions
        of settings, of the number of records and of earlier plans: of no row.

    Args:
        ledger: The client's ledger.
        config: The run config.
        run_id: Flower's id of the run.
        make_plan: Target epsilon -> the plan of the run's first round.
        node_limit: The node's own `max-epsilon`; None: not set.

    Raises:
        ConfigError: There are fewer records than one expected batch.
        PrivacyError: The ledger cannot be trusted.
    """

    def __init__(
        self,
        ledger: RecordLedger,
        config: RunConfig,
        run_id: int,
        make_plan: Callable[[float], RecordPlan],
        node_limit: float | None,
    ) -> None:
        privacy = config.privacy
        run_limit = privacy.max_epsilon or privacy.target_epsilon or math.inf
        self._limit = min(run_limit, math.inf if node_limit is None else node_limit)
        self._ledger = ledger
        target = privacy.target_epsilon
        if target > 0:
            target = min(target, self._limit)
        run = _run_name(config, run_id, target)
        self.plan: RecordPlan = ledger.plan(run) or ledger.remember_plan(
            run, make_plan(target)
        )

    def require(self) -> None:
        """Check before training that the round does not pass the limit.

        Raises:
            BudgetError: It would.
        """
        plan = self.plan
        self._ledger.require(plan.event, plan.delta, self._limit)

    def spend(self) -> float:
        """Pay for a round, on disk, before its adapter leaves; return the epsilon.

        Raises:
            BudgetError: The round passes the limit after all.
            PrivacyError: The ledger cannot be written.
        """
        plan = self.plan
        return self._ledger.spend(plan.event, plan.delta, self._limit)


def _run_name(config: RunConfig, run_id: int, target_epsilon: float) -> str:
    """Return a name of all that a run's plan depends on, except the records."""
    settings = flat(config)
    parts = [run_id, target_epsilon, *(settings[key] for key in _PLANNED_BY)]
    if config.is_joint:
        parts.append(config.privacy.noise)
    if config.data.person_column:
        parts.append(config.data.person_column)
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def open_budget(
    config: RunConfig,
    node: NodeConfig,
    run_id: int,
    num_records: int,
    log: ClientLog,
) -> RecordBudget:
    """Return the budget of a client, with its ledger on this machine.

    Args:
        config: The run config.
        node: The client's node config.
        run_id: Flower's id of the run.
        num_records: n, all rows of the client, or the public number of its persons.
        log: Gets a line if a real client's ledger begins.

    Raises:
        ConfigError: There are fewer records than one expected batch, or the ledger counts
            another unit.
        PrivacyError: The ledger cannot be trusted.
    """

    def plan(target: float) -> RecordPlan:
        return client_plan(config, num_records, target)

    ledger = _own_ledger(config, node, run_id, log)
    return RecordBudget(ledger, config, run_id, plan, node.max_epsilon)


def open_joint_budget(
    config: RunConfig,
    node: NodeConfig,
    run_id: int,
    numbers: Mapping[str, object],
    log: ClientLog,
) -> RecordBudget:
    """Return the budget of a client whose noise the server adds, for steps of one round.

    Args:
        config: The run config, with `privacy.noise="joint"`.
        node: The client's node config.
        run_id: Flower's id of the run.
        numbers: The server's message: z by NOISE_MULTIPLIER, and by TOTAL_ROWS the rows
            that all clients declared.
        log: Gets a line if a real client's ledger begins.

    Raises:
        ConfigError: The server's numbers are none, promise less than the run config, or are
            not those of the run's first step.
        PrivacyError: The ledger cannot be trusted.
    """
    wanted = _joint_plan(config, numbers.get(NOISE_MULTIPLIER), numbers.get(TOTAL_ROWS))
    ledger = _own_ledger(config, node, run_id, log)
    budget = RecordBudget(ledger, config, run_id, lambda _: wanted, node.max_epsilon)
    if budget.plan != wanted:
        raise ConfigError(
            "privacy.noise: the server named other numbers in an earlier step of this run "
            f"(noise multiplier and probability {budget.plan.event[:2]}, and now "
            f"{wanted.event[:2]})"
        )
    return budget


def _joint_plan(
    config: RunConfig, noise_multiplier: object, total_rows: object
) -> RecordPlan:
    """Return the plan that a server's numbers make.

    Raises:
        ConfigError: They are none, or promise less than the run config.
    """
    batch, least = config.train.expected_batch_size, config.privacy.noise_multiplier
    if type(total_rows) is not int or total_rows < batch:
        raise ConfigError(
            f"{TOTAL_ROWS}: the server must name at least {batch} rows, one expected batch "
            f"(got {total_rows!r})"
        )
    if type(noise_multiplier) is not float or not max(
        least, SMALLEST_NOISE
    ) <= noise_multiplier < (math.inf):
        raise ConfigError(
            f"{NOISE_MULTIPLIER}: the server must name a number of at least "
            f"{max(least, SMALLEST_NOISE):g} (got {noise_multiplier!r})"
        )
    return RecordPlan(
        noise_multiplier=noise_multiplier,
        sampling_probability=batch / total_rows,
        steps=1,
        expected_batch_size=batch,
        delta=config.privacy.delta or default_delta(total_rows),
    )


def _own_ledger(
    config: RunConfig, node: NodeConfig, run_id: int, log: ClientLog
) -> RecordLedger:
    """Return a client's ledger, and log the line if a real one begins.

    Raises:
        ConfigError: It counts another unit than this run's.
        PrivacyError: It cannot be trusted.
    """
    simulated = node.partition_id if node.is_simulated else None
    folder = ledger_folder(fedllm_home(), run_id, simulated)
    unit: Unit = "person" if config.data.person_column else "row"
    ledger = RecordLedger(folder, unit)
    if ledger.is_new and simulated is None:
        log.write_new_ledger(folder)
    return ledger
