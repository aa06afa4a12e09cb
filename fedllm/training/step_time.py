"""How long record level's gradients take on this machine, tried on public tokens."""

import time

from fedllm.adapters.adapted_model import AdaptedModel
from fedllm.config import RunConfig
from fedllm.training.dp_sgd import ready_for_gradients
from fedllm.training.per_example_gradients import PerExample, public_example
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
        per_example = PerExample(adapted.model, adapted.pad_token_id)
        example = public_example(0, config.train.max_length, per_example.num_tokens)
        seconds = 0.0
        # The first pass also tries what later ones rely on.
        for _ in range(2):
            began = time.monotonic()
            for _ in per_example.gradients([example] * size, size):
                pass
            seconds = time.monotonic() - began
    return seconds
