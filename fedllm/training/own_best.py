"""A client's training to its own best: several passes, stopped by rows that it held out."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from transformers.trainer_callback import (
    TrainerCallback,
    TrainerControl,
    TrainerState,
)

from fedllm.adapters.adapted_model import AdaptedModel
from fedllm.adapters.spec import Arrays
from fedllm.config import TrainConfig
from fedllm.errors import DataError
from fedllm.training.sft import watched_training
from fedllm.training.task import RoundTask

logger = logging.getLogger(__name__)

_CHECKS_PER_PASS = 2
_LEAST_BATCH = 4
"""Examples of a step, if `train.batch-size` is smaller."""
_PATIENCE = 3
"""Checks without a new best after which a training ends."""


@dataclass(frozen=True)
class OwnBestConfig:
    """How a client seeks its own best.

    Attributes:
        learning_rates: Each is tried; Adam's, which falls by half a cosine.
        passes: Over the client's rows, at most.
        seed: Of the order of the rows, and of those that `split_tenth` holds out.
        proximal_mu: Weight of the pull towards the start.
    """

    learning_rates: Sequence[float]
    passes: float
    seed: int
    proximal_mu: float = 0.0


@dataclass(frozen=True)
class OwnRows:
    """A client's rows, each with `input_ids` and `labels`.

    Attributes:
        training: Those to train on.
        judging: Those that end each training and choose among them.
    """

    training: Sequence[Mapping[str, Any]]
    judging: Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class OwnBest:
    """The best that a client found.

    Attributes:
        arrays: The trained values.
        losses: On the held-out rows at each check of the chosen training, the start's first.
        learning_rate: The chosen one; None if the start was best.
        num_examples: Examples trained on until the best check; a row counts in each pass.
    """

    arrays: Arrays
    losses: list[float]
    learning_rate: float | None
    num_examples: int


def train_to_own_best(
    adapted: AdaptedModel,
    rows: OwnRows,
    start: Arrays,
    train: TrainConfig,
    config: OwnBestConfig,
    score: Callable[[Sequence[Mapping[str, Any]]], float],
) -> OwnBest:
    """Train from given values on a client's rows, judged by rows that it held out.

    Args:
        adapted: The resident model; its trained values are overwritten.
        rows: The client's rows, with at least one of each sort.
        start: Where each training starts. It is the result if none is better.
        train: Examples of a pass, and what else is no matter of length, optimiser or pull.
        config: What to try.
        score: Returns the loss of the resident model on rows, in nats per answer token.
    """
    own, judged = rows.training, rows.judging
    train = replace(
        train,
        # Large accumulated batches serve the noise of a round: here they leave few steps.
        gradient_accumulation=max(1, _LEAST_BATCH // train.batch_size),
        local_steps=0,
        local_epochs=config.passes,
        optimizer="adamw",
        proximal_mu=config.proximal_mu,
    )
    adapted.set(start)
    before = score(judged)
    best = OwnBest(start, [before], None, 0)
    for rate in config.learning_rates:
        watch = _Watch(adapted, lambda: score(judged), before, len(own), train)
        task = RoundTask(start, rate, config.seed)
        watched_training(adapted, own, train, task, "cosine", [watch])
        found = watch.best
        if found is not None and min(watch.losses) < min(best.losses):
            best = OwnBest(found, watch.losses, rate, watch.num_examples)
    return best


def split_tenth(examples: Sequence[Mapping[str, Any]], seed: int) -> OwnRows:
    """Return rows of which a tenth, at least one, judges.

    Raises:
        DataError: There are fewer than two.
    """
    if len(examples) < 2:
        raise DataError(
            f"{len(examples)} usable rows: one to train on and one that judges are needed"
        )
    order = np.random.default_rng(seed).permutation(len(examples))
    count = max(1, round(len(examples) / 10))
    ordered = [examples[int(i)] for i in order]
    return OwnRows(ordered[count:], ordered[:count])


class _Watch(TrainerCallback):  # type: ignore[misc] # transformers has no types
    """Scores held-out rows twice a pass, keeps the best values, and ends the training."""

    def __init__(
        self,
        adapted: AdaptedModel,
        score: Callable[[], float],
        before: float,
        num_rows: int,
        train: TrainConfig,
    ) -> None:
        self.losses = [before]
        self.best: Arrays | None = None
        self.num_examples = 0
        self._adapted = adapted
        self._score = score
        self._num_rows = num_rows
        self._batch = train.batch_size * train.gradient_accumulation
        steps_per_pass = -(-num_rows // self._batch)
        self._every = max(1, steps_per_pass // _CHECKS_PER_PASS)

    def on_step_end(
        self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        step = state.global_step
        if step % self._every and step < state.max_steps:
            return
        loss = self._score()
        self._adapted.model.train()
        if loss < min(self.losses):
            self.best = self._adapted.get()
            self.num_examples = round(state.epoch * self._num_rows)
        self.losses.append(loss)
        logger.info("step %d of %d: held-out loss %.3f", step, state.max_steps, loss)
        since = len(self.losses) - 1 - self.losses.index(min(self.losses))
        if since >= _PATIENCE:
            control.should_training_stop = True
