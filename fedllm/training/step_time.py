"""How long record level's gradients take on this machine, tried on public tokens."""

import time

from fedllm.adapters.adapted_model import AdaptedModel
from fedllm.config import RunConfig
from fedllm.data.tokens import pair_of
from fedllm.training.dp_sgd import ready_for_gradients
from fedllm.training.objectives import objective_of
from fedllm.training.per_example_gradients import public_example
from fedllm.training.task import RoundTask


def seconds_of_micro_batch(adapted: AdaptedModel, config: RunConfig) -> float:
    """Return the seconds that the gradients of a full micro-batch of the longest rows take.

    Args:
        adapted: The resident model; its trained values are left as they were.
        config: Gives the micro-batch, `train.batch_size`, and `train.max_length`.

    Raises:
        ConfigError: The base model has dropout, or remembers other rows.

    Guarantee:
        A function of settings, model and machine: no row is read.
    """
    size = config.train.batch_size
    with ready_for_gradients(adapted, config, RoundTask(adapted.get(), 0.0)):
        objective = objective_of(config.train)
        per_example = objective.make_gradients(adapted, config.train)
        length = config.train.max_length
        example = public_example(0, length, per_example.num_tokens)
        if objective.has_pairs:
            other = public_example(1, length, per_example.num_tokens)
            example = pair_of(example, other)
        seconds = 0.0
        # The first pass also tries what later ones rely on.
        for _ in range(2):
            began = time.monotonic()
            for _ in per_example.gradients([example] * size, size):
                pass
            seconds = time.monotonic() - began
    return seconds
