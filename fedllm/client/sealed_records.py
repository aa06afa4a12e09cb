"""A client's part of a step at record level whose server is not trusted.

The order: the slot's settings are checked; the slot, and the step with the noise that the trustees
will add, are paid for on this disk; only then a coin is tossed. From there on the reply has one
form: whatever fails is a sum of zeros, under pads as any other. Coins, the number of records
drawn and the sum itself never leave but under pads.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from flwr.app import Message, RecordDict

from fedllm.client.failures import code_of
from fedllm.client.record_budget import open_joint_budget
from fedllm.client.refusals import Refusals
from fedllm.client.run_client import RunClient
from fedllm.client.sealing import agreed_slot, spend_slot, under_pads
from fedllm.config import RunConfig, fedllm_home
from fedllm.errors import PrivacyError
from fedllm.privacy.agreement import SlotSettings
from fedllm.privacy.joint_sum import largest_batch
from fedllm.privacy.mechanism import Integers
from fedllm.privacy.record_ledger import RecordPlan
from fedllm.training.task import RoundTask
from fedllm.wire.messages import NOISE_MULTIPLIER, TOTAL_ROWS

if TYPE_CHECKING:
    from fedllm.adapters.adapted_model import AdaptedModel
    from fedllm.training.person_gradients import Record

TakeUp = Callable[[], "tuple[AdaptedModel, Sequence[Record | None], RoundTask]"]
"""Loads the model and the client's records, and reads where the gradients are taken."""


@dataclass(frozen=True)
class _Work:
    """What a step computes, once it is paid for.

    Attributes:
        plan: z, q and the expected batch.
        fitted: The run config whose micro-batches fit this machine.
        take_up: Loads model and records.
    """

    plan: RecordPlan
    fitted: RunConfig
    take_up: TakeUp


def sealed_step(
    message: Message, client: RunClient, fitted: RunConfig, take_up: TakeUp
) -> RecordDict:
    """Pay for a step, sum a batch's clipped gradients, and return them, padded and sealed.

    `fitted` is the run config whose micro-batches fit this machine.

    Guarantee:
        A client answers a slot at most once, and its ledger counts the step, with z and q of
        the slot's settings, before a coin is tossed. What leaves has d values modulo 2^32 and
        one packet for each trustee, whatever `take_up` and the batch are. The integers below
        the pads change by a norm of at most A if one record joins or leaves (`batch_sum`).
        Not covered: a step that fails for want of time or memory is zero, and so tells in its
        sum, under the noise, that it failed; after three such steps of a run the client
        computes none, and sends zeros.

    Raises:
        BudgetError: The step would pass a limit, or the slot was answered.
        ConfigError: The slot's numbers are not those of the run's first step.
        PrivacyError: The slot is not what this node's owner and the run config demand.
    """
    settings = agreed_slot(message, client)
    _require_step(settings, client)
    spend_slot(client, settings)
    numbers = {
        NOISE_MULTIPLIER: settings.noise_multiplier,
        TOTAL_ROWS: settings.total_rows,
    }
    budget = open_joint_budget(
        client.config, client.node, client.run_id, numbers, client.log
    )
    epsilon = budget.spend()
    work = _Work(budget.plan, fitted, take_up)
    integers = _integers(client, settings, work)
    client.log.write(
        f"client {client.node.partition_id}: step {settings.slot}: epsilon {epsilon:.3f} of "
        "this client's records so far, against the server and "
        f"{settings.colluding} of {len(settings.trustees)} trustees"
    )
    return under_pads(integers, settings)


def _require_step(settings: SlotSettings, client: RunClient) -> None:
    """Check what the settings of a step have beside those of a round.

    Raises:
        PrivacyError: They are not the run config's.
    """
    config = client.config
    room = largest_batch(config.train.expected_batch_size)
    if settings.num_records != room:
        raise PrivacyError(
            f"train.batch-size: the sum of a step has room for {room} records (the slot's "
            f"settings: {settings.num_records})"
        )
    if settings.clipping_norm != config.privacy.max_grad_norm:
        raise PrivacyError(
            f"privacy.max-grad-norm: is {config.privacy.max_grad_norm} (the slot's settings: "
            f"{settings.clipping_norm})"
        )


def _integers(client: RunClient, settings: SlotSettings, work: _Work) -> Integers:
    """Return the sum of a batch on the slot's grid; zeros if anything fails."""
    refusals = Refusals(
        fedllm_home() / "refusals", client.attempt, client.node.partition_id
    )
    try:
        refusals.begin()
        integers = _batch(client, settings, work)
        refusals.release()
    except Exception as error:  # noqa: BLE001 - a failure is a sum of zeros
        client.log.write_failure(code_of(error), error)
        return np.zeros(settings.size, np.int64)
    return integers


def _batch(client: RunClient, settings: SlotSettings, work: _Work) -> Integers:
    """Return the sum of a batch's clipped gradients, in the order of the sorted names.

    Raises:
        PrivacyError: The adapter has another size than the slot.
    """
    from fedllm.training.joint_step import batch_sum

    began = time.monotonic()
    adapted, records, task = work.take_up()
    if adapted.spec.num_trainable != settings.size:
        raise PrivacyError(
            f"the slot has {settings.size} values, and the adapter "
            f"{adapted.spec.num_trainable}"
        )
    task.check_deadline(0)
    units = settings.grid.sensitivity
    summed = batch_sum(adapted, records, work.fitted, work.plan, task, units)
    client.log.write(
        f"client {client.node.partition_id}: step {settings.slot}: sum of a batch after "
        f"{time.monotonic() - began:.1f} s; {summed.num_unfit} of the examples drawn could "
        "not be taken"
    )
    named = summed.integers
    return np.concatenate([named[name].ravel() for name in sorted(named)])
