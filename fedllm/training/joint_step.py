"""One client's part of a step whose noise the server adds: the sum of its records' gradients.

Gradients, clipping and coins are those of `dp_sgd`; what differs is that the sum leaves as
integers of a grid that the whole federation shares, without noise and without a division.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fedllm.adapters.adapted_model import AdaptedModel
from fedllm.config import RunConfig
from fedllm.privacy.joint_sum import record_units
from fedllm.privacy.mechanism import FixedPointSum, Integers, SecureGenerator
from fedllm.privacy.record_ledger import RecordPlan
from fedllm.training.dp_sgd import add_clipped, drawn, ready_for_gradients
from fedllm.training.objectives import objective_of
from fedllm.training.per_example_gradients import PerExample
from fedllm.training.person_gradients import Record
from fedllm.training.task import RoundTask


@dataclass(frozen=True)
class BatchSum:
    """The sum of the clipped gradients of one Poisson batch.

    Attributes:
        integers: Name -> int64 in the shape of the trained values.
        num_unfit: Examples that the model could not take, for the client's own log.
    """

    integers: dict[str, Integers]
    num_unfit: int


def batch_sum(
    adapted: AdaptedModel,
    examples: Sequence[Record | None],
    config: RunConfig,
    plan: RecordPlan,
    task: RoundTask,
    units: int | None = None,
) -> BatchSum:
    """Draw a batch of a client's records and return the sum of their clipped gradients.

    Args:
        adapted: The resident model; its trained values are overwritten.
        examples: One a record, or a tuple of all of one person's; None for a record that
            nothing can be learned from.
        config: Gives the micro-batch, `train.batch_size`, and `privacy.max_grad_norm`.
        plan: z, q, and the expected batch of the whole federation.
        task: Where the gradients are taken.
        units: U, which the largest norm of one gradient has on the grid; None: as many as a
            server that adds the noise has room for, `record_units`.

    Raises:
        AdapterError: The task's arrays are not those of this adapter.
        ConfigError: The base model has dropout, or remembers other rows.
        PrivacyError: z is so large that the grid would be coarse.

    Guarantee:
        The sum is over a Poisson batch of probability q: each record has a secret coin of
        its own, whatever it holds, and no batch is cut or drawn again. If one record joins
        or leaves, the sum changes by nothing (its coin fell the other way) or by a vector of
        integers of norm at most U: the record's gradient, clipped to `max_grad_norm` and cut
        toward zero. Gradients depend on their own record alone
        (`PerExample`), and integers add exactly. A record without an example, or without a
        finite gradient, adds zero. Shapes, types and size are those of the adapter, also
        for an empty batch.
    """
    generator, norm = SecureGenerator(), config.privacy.max_grad_norm
    if units is None:
        # The grid is the whole federation's, whatever rank this node trains.
        units = record_units(
            adapted.spec.num_trainable, plan.noise_multiplier, plan.expected_batch_size
        )
    with ready_for_gradients(adapted, config, task):
        per_example = objective_of(config.train).make_gradients(adapted, config.train)
        size = sum(parameter.numel() for parameter in per_example.trained)
        total = FixedPointSum(size, norm, units)
        batch = drawn(examples, plan.sampling_probability, generator)
        add_clipped(total, per_example, batch, config.train.batch_size, norm)
    named = _named(total.integers(), per_example, adapted)
    return BatchSum(named, per_example.num_unfit)


def _named(
    integers: Integers, per_example: PerExample, adapted: AdaptedModel
) -> dict[str, Integers]:
    """Return a flat sum, in the order of the model, by the names that travel.

    A column that this node does not train adds zero.
    """
    parts: dict[int, Integers] = {}
    start = 0
    for parameter in per_example.trained:
        part = integers[start : start + parameter.numel()]
        parts[id(parameter)] = part.reshape(tuple(parameter.shape))
        start += parameter.numel()
    named = {name: parts[id(p)] for name, p in adapted.parameters().items()}
    for name, held in adapted.rest.items():
        named[name] = np.pad(named[name], ((0, 0), (0, held.shape[1])))
    return named
