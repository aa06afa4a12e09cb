"""A person moves the sum that a client releases by one clip, however many rows they have.

The client's own code sums a batch of a toy model: once with a person among others, once
without. Noise is off and every coin falls, so the two sums of integers differ by that person
alone. The person's rows all pull one way, and some are unusable.
"""

import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fedllm.adapters.adapted_model import AdaptedModel, load_adapted_model
from fedllm.adapters.peft_model import initial_arrays
from fedllm.auditing.toy_model import save_toy_model
from fedllm.config import RunConfig
from fedllm.config_parsing import parse_run_config
from fedllm.data.tokens import Example
from fedllm.privacy.joint_sum import record_units
from fedllm.privacy.mechanism import Integers
from fedllm.privacy.record_ledger import RecordPlan
from fedllm.training.person_gradients import Record
from fedllm.training.task import RoundTask

NUMBERS_OF_ROWS = (1, 2, 5, 20)
_OTHERS = 3
# So small that every gradient is clipped, and what moves the sum is near the bound.
_NORM = 1e-4
_EVERY = RecordPlan(1.0, 1.0, 1, _OTHERS + 1, 1e-5)

Sum = Callable[[Sequence[Record | None]], Integers]
"""A client's records -> the sum that it releases, before the noise."""


@dataclass(frozen=True)
class PersonFindings:
    """By how much one person moved the sum.

    Attributes:
        moved: Number of the person's rows -> the change over the largest one allowed.
    """

    moved: dict[int, float]

    @property
    def passed(self) -> bool:
        """Whether no person moved the sum by more than one clip, and each moved it."""
        return all(0.5 < share <= 1 for share in self.moved.values())

    @property
    def text(self) -> str:
        """The finding in words."""
        parts = (f"{rows}: {share:.6f}" for rows, share in self.moved.items())
        return "clips that a person of so many rows moved the sum by: " + ", ".join(
            parts
        )


def check_persons() -> PersonFindings:
    """Sum batches with and without a person of 1, 2, 5 and 20 rows, by the client's code."""
    with tempfile.TemporaryDirectory(prefix="fedllm-audit-") as name:
        model = Path(name) / "model"
        save_toy_model(model, "{{ messages }}")
        config = parse_run_config(
            {
                "privacy.unit": "record",
                "privacy.max-grad-norm": _NORM,
                "data.person-column": "person",
                "model.name": str(model),
                "model.quantization": 0,
                "adapter.kind": "lora-core",
                "adapter.rank": 2,
                "adapter.target-modules": "q_proj",
            }
        )
        adapted = load_adapted_model(config, Path(name) / "home")
        size = adapted.spec.num_trainable
        units = record_units(size, _EVERY.noise_multiplier, _EVERY.expected_batch_size)
        return PersonFindings(_moved(_summed(adapted, config), units))


def _moved(summed: Sum, units: int) -> dict[int, float]:
    """Return each person's change of the sum, over U."""
    others = [tuple(_example(10 * who + n) for n in range(2)) for who in range(_OTHERS)]
    without = summed(others)
    moved = {}
    for number in NUMBERS_OF_ROWS:
        person = (_example(77),) * number + (_unusable(),)
        change = summed([*others, person]) - without
        moved[number] = math.sqrt(sum(int(v) ** 2 for v in change)) / units
    return moved


def _summed(adapted: AdaptedModel, config: RunConfig) -> Sum:
    """Return the client's sum of a batch, flat."""
    from fedllm.training.joint_step import batch_sum

    task = RoundTask(initial_arrays(adapted.spec), 1.0)

    def summed(records: Sequence[Record | None]) -> Integers:
        named = batch_sum(adapted, records, config, _EVERY, task).integers
        return np.concatenate([part.ravel() for part in named.values()])

    return summed


def _example(number: int) -> Example:
    """Return tokens of nobody, other ones for each number."""
    tokens = [1 + (7 * number + 5 * place * place) % 200 for place in range(12)]
    return {"input_ids": tokens, "labels": [-100] * 4 + tokens[4:]}


def _unusable() -> Example:
    """Return a row with a token that the model has not got."""
    return {"input_ids": [1, 10**6], "labels": [-100, 10**6]}
