"""One client's task in one round: what differs from client to client and round to round."""

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedllm.errors import TimeLimitError


@dataclass(frozen=True)
class RoundTask:
    """One client's task in one round.

    Attributes:
        arrays: The global adapter's trained values, where the training starts.
        learning_rate: The round's learning rate.
        seed: Order of the examples and dropout; DP-SGD ignores it, since its randomness
            is the operating system's.
        deadline: `time.monotonic()` after which no step begins.
    """

    arrays: Mapping[str, Any]
    learning_rate: float
    seed: int = 0
    deadline: float = math.inf

    def check_deadline(self, num_steps: int) -> None:
        """Raise if the deadline has passed.

        Args:
            num_steps: Steps that were taken.

        Raises:
            TimeLimitError: It has passed.
        """
        if time.monotonic() > self.deadline:
            raise TimeLimitError(
                f"strategy.round-timeout: is over after {num_steps} steps of training, "
                "so the update would come too late to count; raise it, or lower "
                "train.local-steps"
            )


def training_seed(seed: int, server_round: int, partition_id: int) -> int:
    """Return the seed of one client's training in one round, below 2**32."""
    sequence = np.random.SeedSequence((seed, server_round, partition_id))
    return int(sequence.generate_state(1)[0])
