"""DP-SGD on one client: record-level differential privacy of what it sends.

Every step releases S = sum over a Poisson batch of clip(gradient of one example) +
N(0, (z * max_grad_norm)^2 I), divided by the expected size of a batch (Abadi et al. 2016,
arXiv 1607.00133); optimiser, weight decay and FedProx come after it and cost nothing.
Example texts, their tokens, the answer-only loss, the adapter and the base are those of
`training.py`.
"""

import math
import secrets
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import get_constant_schedule_with_warmup

from fedllm.adapters.peft_model import get_trained, set_trained
from fedllm.adapters.spec import AdapterSpec
from fedllm.config import TrainConfig
from fedllm.privacy.mechanism import (
    FixedPointSum,
    SecureGenerator,
    Vector,
    clipped,
    noised_sum,
)
from fedllm.privacy.record_ledger import RecordPlan
from fedllm.training.mapped_weights import release_mapped_pages
from fedllm.training.per_example_gradients import PerExample
from fedllm.training.result import Trained, check_deadline, restoring

if TYPE_CHECKING:
    from peft import PeftModel


def train_privately(
    model: "PeftModel",
    spec: AdapterSpec,
    pad_token_id: int,
    examples: Sequence[Mapping[str, Any]],
    arrays: Mapping[str, Any],
    config: TrainConfig,
    max_grad_norm: float,
    learning_rate: float,
    plan: RecordPlan,
    deadline: float = math.inf,
) -> Trained:
    """Fine-tune the adapter from given values by DP-SGD on one client's examples.

    Args:
        model: The resident base model with the adapter on it; its trained values are
            overwritten, everything else is left as it was.
        spec: The adapter.
        pad_token_id: Any token id.
        examples: Rows with `input_ids` and `labels`; at least one.
        arrays: The global adapter's trained values.
        config: Settings of the training; a micro-batch has `batch_size` examples.
        max_grad_norm: Largest L2 norm of one example's gradient.
        learning_rate: The round's learning rate.
        plan: Noise multiplier, sampling probability, steps, expected batch size.
        deadline: `time.monotonic()` after which no step is begun.

    Raises:
        TimeLimitError: The deadline passed before the last step.

    Guarantee:
        The result is a function of `plan.steps` Poisson-subsampled Gaussian mechanisms of
        noise multiplier z over the examples, and of nothing else that depends on them:
        add-or-remove of one example changes each sum by at most max_grad_norm before the
        noise. An example whose gradient is not finite counts as zero; an empty batch is a
        step of noise. Loss and batch sizes are not returned. Dropout's masks come from the
        operating system's randomness: masks that the server could compute would change
        with every other example of a batch.
    """
    generator = SecureGenerator()
    # fork_rng puts torch's own generator back, so nobody sees what was drawn.
    sparing = release_mapped_pages(model) if config.gradient_checkpointing else None
    with restoring(model), sparing or nullcontext(), torch.random.fork_rng():
        torch.manual_seed(secrets.randbits(63))
        if config.gradient_checkpointing:
            model.get_base_model().activation_checkpointing_enable()
        model.train()
        set_trained(model, spec, arrays)
        per_example = PerExample(model, pad_token_id)
        update = _Update(per_example.trained, config, learning_rate)
        for step in range(plan.steps):
            check_deadline(deadline, step)
            coins = generator.bernoulli(plan.sampling_probability, len(examples))
            batch = [row for row, coin in zip(examples, coins, strict=True) if coin]
            total = clipped_sum(per_example, batch, config.batch_size, max_grad_norm)
            released = noised_sum(
                total, plan.noise_multiplier, max_grad_norm, generator
            )
            update.step(released / plan.expected_batch_size)
        trained = get_trained(model, spec)
    return Trained(trained, math.nan, len(examples), plan.steps)


def clipped_sum(
    per_example: PerExample,
    batch: Sequence[Mapping[str, Any]],
    micro_batch_size: int,
    max_grad_norm: float,
) -> FixedPointSum:
    """Return the sum of the clipped gradients of a batch's examples.

    Args:
        per_example: Where the gradients come from.
        batch: Examples; may be empty.
        micro_batch_size: Examples in one pass.
        max_grad_norm: Largest norm of one gradient.

    Guarantee:
        Every example adds at most `max_grad_norm`, and the sum is the same in any order.
    """
    size = sum(p.numel() for p in per_example.trained)
    total = FixedPointSum(size, max_grad_norm)
    for rows in per_example.gradients(batch, micro_batch_size):
        for row in rows.numpy():
            gradient = clipped(row.astype(np.float64), max_grad_norm).update
            if gradient is not None:
                total.add(gradient)
    return total


class _Update:
    """The optimiser's step on a noised gradient: post-processing all of it."""

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
