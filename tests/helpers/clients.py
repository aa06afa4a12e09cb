"""A resident model with its examples, which trains once."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedllm.adapters.adapted_model import AdaptedModel
from fedllm.adapters.peft_model import initial_arrays
from fedllm.config import TrainConfig
from fedllm.training.result import Trained
from fedllm.training.sft import train_adapter
from fedllm.training.task import RoundTask
from tests.helpers.tiny_models import SENTENCES

PLAIN = TrainConfig(batch_size=4, local_steps=3, learning_rate=0.5)


def rows() -> list[dict[str, str]]:
    """Ten questions with answers of uneven length."""
    cut = [
        text.partition("? ") if "? " in text else text.partition(". ")
        for text in SENTENCES
    ]
    return [{"instruction": q, "response": a} for q, _, a in cut]


@dataclass(frozen=True, eq=False)
class Client(AdaptedModel):
    """A resident model and its examples."""

    examples: list[dict[str, Any]]

    def start(self, seed: int = 0) -> dict[str, Any]:
        """Return trained values as after some rounds."""
        draw = np.random.default_rng(seed)
        return {
            name: (value + draw.normal(0, 0.05, value.shape)).astype(np.float32)
            for name, value in initial_arrays(self.spec).items()
        }

    def train(self, config: TrainConfig = PLAIN, seed: int = 1, **more: Any) -> Trained:
        arrays = more.get("arrays", self.start())
        task = RoundTask(arrays, config.learning_rate, seed)
        return train_adapter(self, more.get("examples", self.examples), config, task)


Make = Callable[..., Client]


def assert_same(one: dict[str, Any], two: dict[str, Any], atol: float = 1e-6) -> None:
    assert set(one) == set(two)
    for name in one:
        np.testing.assert_allclose(one[name], two[name], rtol=1e-4, atol=atol)


def preferences() -> list[dict[str, str]]:
    """Ten questions, each with its own answer and that of the next."""
    own = rows()
    return [
        {
            "prompt": row["instruction"],
            "chosen": row["response"],
            "rejected": other["response"],
        }
        for row, other in zip(own, own[1:] + own[:1], strict=True)
    ]
