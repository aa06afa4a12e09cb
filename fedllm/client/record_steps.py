"""A client's part under record level: paid for on its own disk before anything leaves."""

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from flwr.app import ConfigRecord, MetricRecord, RecordDict

from fedllm.client.cache import num_partition_records
from fedllm.client.run_client import RunClient
from fedllm.config import RunConfig
from fedllm.errors import ConfigError
from fedllm.training.task import RoundTask
from fedllm.wire.messages import ARRAYS, DECLARED_ROWS, METRICS, array_record

if TYPE_CHECKING:
    from fedllm.adapters.adapted_model import AdaptedModel
    from fedllm.training.person_gradients import Record
    from fedllm.training.result import Trained


def declare_rows(client: RunClient) -> RecordDict:
    """Return a reply with the number that this client declares; raises as there."""
    metrics = MetricRecord({DECLARED_ROWS: declared_number(client)})
    return RecordDict({METRICS: metrics})


def declared_number(client: RunClient) -> int:
    """Return how many rows, or persons, this client declares as public, which no row decides.

    Raises:
        ConfigError: The node's owner declares nothing.
        DataError: A virtual client's rows cannot be read.
    """
    config, node = client.config, client.node
    by_person = bool(config.data.person_column)
    declared = node.declared_persons if by_person else node.declared_rows
    if declared is None and not node.is_simulated:
        what = "persons" if by_person else "rows"
        raise ConfigError(
            f"node config: declared-{what}: is missing: under privacy.noise='joint' the owner "
            f"declares how many {what} the node has, as a public number"
        )
    if declared is None:
        declared = num_partition_records(node, config)
    return declared


def public_number(client: RunClient, records: "Sequence[Record | None]") -> int:
    """Return n, the public number of a client's records, of which q and noise are made.

    A real client's number of persons is what its owner declares, and never what the file
    holds: one row decides whether a person is there. The number of its rows is public by
    assumption, as are the persons of a virtual client, behind which nobody stands.
    """
    declared = client.node.declared_persons
    if client.config.data.person_column and declared is not None:
        return declared
    return len(records)


def fit_privately(
    client: RunClient,
    adapted: "AdaptedModel",
    records: "Sequence[Record | None]",
    task: RoundTask,
    fitted: RunConfig,
) -> tuple["Trained", float]:
    """Train by DP-SGD, and pay on this client's disk before anything leaves.

    Args:
        client: The client; its run config makes the plan.
        adapted: The resident model.
        records: The client's records.
        task: Where the training starts, and until when.
        fitted: The run config whose micro-batches fit this machine.

    Returns:
        The result, and the epsilon of all that this client has released.

    Raises:
        BudgetError: The round would pass the node's or the run's limit.
        ConfigError: The client has fewer records than a batch, or its ledger counts another
            unit.
        PrivacyError: The ledger cannot be trusted or written.
    """
    from fedllm.client.record_budget import open_budget
    from fedllm.training.dp_sgd import train_privately

    config = client.config
    number = public_number(client, records)
    budget = open_budget(config, client.node, client.run_id, number, client.log)
    budget.require()
    trained = train_privately(adapted, records, fitted, budget.plan, task)
    return trained, budget.spend()


def sum_batch(
    client: RunClient,
    record: ConfigRecord,
    adapted: "AdaptedModel",
    records: "Sequence[Record | None]",
    task: RoundTask,
    fitted: RunConfig,
) -> RecordDict:
    """Return the sum of a batch's clipped gradients, paid for before its coins are tossed.

    `fitted` is the run config whose micro-batches fit this machine. A step that fails afterwards stays paid for: its cost is no function of rows.

    Raises:
        BudgetError: The step would pass the node's or the run's limit.
        ConfigError: The server's numbers are not those of the run.
        PrivacyError: The ledger cannot be trusted or written.
        TimeLimitError: The time was up before the step began.
    """
    from fedllm.client.record_budget import open_joint_budget
    from fedllm.training.joint_step import batch_sum

    config, node = client.config, client.node
    began = time.monotonic()
    budget = open_joint_budget(config, node, client.run_id, record, client.log)
    task.check_deadline(0)
    epsilon = budget.spend()
    summed = batch_sum(adapted, records, fitted, budget.plan, task)
    client.log.write(
        f"client {node.partition_id}: step {record['server-round']!r}: sum of a batch after "
        f"{time.monotonic() - began:.1f} s; {summed.num_unfit} of the examples drawn could "
        f"not be taken; epsilon {epsilon:.3f} of this client's records so far, if the server "
        "adds the noise that it names"
    )
    return RecordDict({ARRAYS: array_record(summed.integers)})
