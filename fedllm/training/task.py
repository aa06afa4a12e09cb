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
        deadline: `time.monotonic()` after which no step begins, and nothing counts.
        stop_at: `time.monotonic()` at which the training stops, and what it did counts; a
            step that would probably end later does not begin.
    """

    arrays: Mapping[str, Any]
    learning_rate: float
    seed: int = 0
    deadline: float = math.inf
    stop_at: float = math.inf

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

    def is_last_step(self, num_steps: int, began: float) -> bool:
        """Return whether the next step would probably end after `stop_at`.

        Args:
            num_steps: Steps that were taken.
            began: `time.monotonic()` when the first one began.
        """
        now = time.monotonic()
        return now + (now - began) / num_steps > self.stop_at

    def require_a_step(self) -> None:
        """Raise if the node's own limit is over before the first step.

        Raises:
            TimeLimitError: It is.
        """
        if time.monotonic() > self.stop_at:
            raise TimeLimitError(
                "max-seconds: is over before the first step of training, so there is "
                "nothing to send; raise it, or drop it from the node config"
            )


def training_seed(seed: int, server_round: int, partition_id: int) -> int:
    """Return the seed of one client's training in one round, below 2**32."""
    sequence = np.random.SeedSequence((seed, server_round, partition_id))
    return int(sequence.generate_state(1)[0])
