"""DP-SGD on one client: record-level differential privacy of what it sends.

Every step releases S = sum over a Poisson batch of clip(gradient of one example) +
N(0, (z * max_grad_norm)^2 I), divided by the expected size of a batch (Abadi et al. 2016,
arXiv 1607.00133); optimiser, weight decay and FedProx come after it and cost nothing.
Examples, the answer-only loss, the adapter and the base are those of `sft.py`.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from transformers import get_constant_schedule_with_warmup

from fedllm.adapters.adapted_model import AdaptedModel
from fedllm.config import RunConfig, TrainConfig
from fedllm.models.randomness import require_no_randomness
from fedllm.privacy.mechanism import (
    FixedPointSum,
    SecureGenerator,
    Vector,
    clipped,
    noised_sum,
    private_sum,
)
from fedllm.privacy.record_ledger import RecordPlan
from fedllm.training.mapped_weights import release_mapped_pages
from fedllm.training.objectives import objective_of
from fedllm.training.per_example_gradients import PerExample
from fedllm.training.person_gradients import (
    Record,
    by_number_of_rows,
    person_gradient,
)
from fedllm.training.result import Trained, restoring
from fedllm.training.task import RoundTask


def train_privately(
    adapted: AdaptedModel,
    examples: Sequence[Record | None],
    config: RunConfig,
    plan: RecordPlan,
    task: RoundTask,
) -> Trained:
    """Fine-tune the adapter from given values by DP-SGD on one client's records.

    Args:
        adapted: The resident model; its trained values are overwritten, everything else
            is left as it was.
        examples: One a record, with `input_ids` and `labels`, or a tuple of all of one
            person's; None for a record that nothing can be learned from.
        config: Gives `train`, of which a micro-batch has `batch_size` examples, and
            `privacy.max_grad_norm`, the largest L2 norm of one record's gradient.
        plan: Noise multiplier, sampling probability, steps, expected batch size.
        task: Where to start, the learning rate and the deadline.

    Raises:
        AdapterError: The task's arrays are not those of this adapter.
        ConfigError: The base model has dropout, or remembers other rows.
        TimeLimitError: The deadline passed before the last step.

    Guarantee:
        The result is a function of `plan.steps` Poisson-subsampled Gaussian mechanisms of
        noise multiplier z over the records, and of nothing else that depends on them:
        add-or-remove of one record changes each sum by at most max_grad_norm before the
        noise. A record without an example, without a gradient, or with one that is not
        finite takes its coin and counts as zero; an empty batch is a step of noise. Loss
        and batch sizes are not returned. Nothing is drawn at random but coins and noise.
    """
    generator = SecureGenerator()
    train = config.train
    norm = config.privacy.max_grad_norm
    with ready_for_gradients(adapted, config, task):
        per_example = objective_of(train).make_gradients(adapted, train)
        update = _Update(per_example.trained, train, task.learning_rate)
        for step in range(plan.steps):
            task.check_deadline(step)
            batch = drawn(examples, plan.sampling_probability, generator)
            z = plan.noise_multiplier
            total = clipped_sum(per_example, batch, train.batch_size, norm, z)
            released = noised_sum(total, z, generator)
            update.step(released / plan.expected_batch_size)
        trained = adapted.get()
    unfit = per_example.num_unfit
    return Trained(trained, math.nan, len(examples), plan.steps, num_unfit=unfit)


@contextmanager
def ready_for_gradients(
    adapted: AdaptedModel, config: RunConfig, task: RoundTask
) -> Iterator[None]:
    """Put the resident model in the mode of the training, at the task's arrays.

    Raises:
        AdapterError: The task's arrays are not those of this adapter.
        ConfigError: The base model has dropout, or remembers other rows.
    """
    model, train = adapted.model, config.train
    require_no_randomness(model)
    sparing = release_mapped_pages(model) if train.gradient_checkpointing else None
    with restoring(model), sparing or nullcontext():
        if train.gradient_checkpointing:
            model.get_base_model().activation_checkpointing_enable()
        model.train()
        adapted.set(task.arrays)
        yield


def clipped_sum(
    per_example: PerExample,
    batch: Sequence[Record],
    micro_batch_size: int,
    max_grad_norm: float,
    noise_multiplier: float,
) -> FixedPointSum:
    """Return the sum of the clipped gradients of a batch's records.

    Args:
        per_example: Gives the gradients.
        batch: Records, each an example or all of one person's; may be empty.
        micro_batch_size: Examples in one pass.
        max_grad_norm: Largest norm of one record's gradient.
        noise_multiplier: z of the noise that will be added.

    Guarantee:
        Every record adds at most `max_grad_norm`, and the sum is the same in any order.
    """
    size = sum(p.numel() for p in per_example.trained)
    total = private_sum(size, max_grad_norm, noise_multiplier)
    add_clipped(total, per_example, batch, micro_batch_size, max_grad_norm)
    return total


def add_clipped(
    total: FixedPointSum,
    per_example: PerExample,
    batch: Sequence[Record],
    micro_batch_size: int,
    max_grad_norm: float,
) -> None:
    """Add the clipped gradients of a batch's records to a sum; arguments as there.

    Guarantee:
        An example whose gradient is not finite, or that has none, adds nothing. A person
        adds one vector, the sum over its rows, clipped once: at most `max_grad_norm`,
        however many rows there are and whatever they hold.
    """
    alone, several = by_number_of_rows(batch)
    for rows in per_example.gradients(alone, micro_batch_size):
        for row in rows.numpy():
            gradient = clipped(row.astype(np.float64), max_grad_norm).update
            if gradient is not None:
                total.add(gradient)
    for person in several:
        summed = person_gradient(per_example, person)
        gradient = clipped(summed, max_grad_norm).update
        if gradient is not None:
            total.add(gradient)


def drawn(
    examples: Sequence[Record | None],
    probability: float,
    generator: SecureGenerator,
) -> list[Record]:
    """Return a Poisson batch: each record by its own secret coin, whatever it holds."""
    coins = generator.bernoulli(probability, len(examples))
    return [
        row
        for row, coin in zip(examples, coins, strict=True)
        if coin and row is not None
    ]


class _Update:
    """The optimiser's step on a noised gradient, all of which is post-processing."""

    def __init__(
        self,
        trained: Sequence[torch.nn.Parameter],
        config: TrainConfig,
        learning_rate: float,
    ) -> None:
        self._trained = list(trained)
        self._reference = [p.detach().clone() for p in self._trained]
        self._config = config
        make = torch.optim.SGD if config.optimizer == "sgd" else torch.optim.AdamW
        self._optimizer: Any = make(
            self._trained, lr=learning_rate, weight_decay=config.weight_decay
        )
        self._schedule = get_constant_schedule_with_warmup(
            self._optimizer, config.warmup_steps
        )

    def step(self, gradient: Vector) -> None:
        """Move the trained values.

        Args:
            gradient: (d,) noised mean gradient, in the order of the parameters.
        """
        start = 0
        for parameter, reference in zip(self._trained, self._reference, strict=True):
            part = gradient[start : start + parameter.numel()].reshape(parameter.shape)
            start += parameter.numel()
            parameter.grad = torch.from_numpy(part.astype(np.float32)).to(parameter)
            if self._config.proximal_mu > 0:
                pull = parameter.detach() - reference
                parameter.grad.add_(pull, alpha=self._config.proximal_mu)
        if self._config.max_grad_norm > 0:
            torch.nn.utils.clip_grad_norm_(self._trained, self._config.max_grad_norm)
        self._optimizer.step()
        self._schedule.step()
        self._optimizer.zero_grad(set_to_none=True)
