"""The server's step: its direction from the (noised) mean update, and its size."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from fedllm.privacy.mechanism import Vector


@dataclass
class ServerOptimizer:
    """The server's optimiser over (noised) mean updates: post-processing.

    Source: Reddi et al. 2021 (arXiv 2003.00295), with their second-moment decay 0.99
    and adaptivity 1e-3.
    """

    name: str
    momentum: float
    first: Vector | None = None
    second: Vector | None = None

    @property
    def moments(self) -> dict[str, Vector]:
        """The moments by name; empty before the first step and without moments."""
        if self.first is None or self.second is None:
            return {}
        return {"first": self.first, "second": self.second}

    def restore(self, moments: Mapping[str, Vector]) -> None:
        """Take over the moments of a checkpoint."""
        self.first, self.second = moments.get("first"), moments.get("second")

    def step(self, update: Vector, learning_rate: float) -> Vector:
        """Return what to add to the adapter, and keep the moments."""
        if self.name == "none":
            return learning_rate * update
        if self.first is None or self.second is None:
            self.first, self.second = np.zeros_like(update), np.zeros_like(update)
        if self.name == "momentum":
            self.first = self.momentum * self.first + update
            return learning_rate * self.first
        self.first = self.momentum * self.first + (1 - self.momentum) * update
        square = update**2
        if self.name == "adam":
            self.second = 0.99 * self.second + 0.01 * square
        else:
            self.second -= 0.01 * square * np.sign(self.second - square)
        return learning_rate * self.first / (np.sqrt(self.second) + 1e-3)


def cosine(first: float, last: float, server_round: int, num_rounds: int) -> float:
    """Return a half cosine from `first` in round 1 to `last` in the last round."""
    if num_rounds == 1:
        return first
    share = (server_round - 1) / (num_rounds - 1)
    return last + (first - last) * (1 + math.cos(math.pi * share)) / 2
