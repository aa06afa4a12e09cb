"""The gradient of a person: the sum over all rows of one person, clipped as one.

The sum, and not the mean: both have the same direction, and the sum of persons who stay below
the norm is the gradient of all their rows. What one person adds is bounded by the clip alone,
so there is no limit on how many rows a person has; they cost time, and memory for one.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from fedllm.privacy.mechanism import Vector
from fedllm.training.per_example_gradients import PerExample

Example = Mapping[str, Any]
Record = Example | tuple[Example, ...]
"""What is clipped as one: one example, or all examples of one person."""


def by_number_of_rows(
    batch: Iterable[Record],
) -> tuple[list[Example], list[tuple[Example, ...]]]:
    """Return the examples that are a record each, and the persons with several.

    Guarantee:
        Where a record goes is a function of that record alone.
    """
    alone: list[Example] = []
    several: list[tuple[Example, ...]] = []
    for record in batch:
        if not isinstance(record, tuple):
            alone.append(record)
        elif len(record) == 1:
            alone.append(record[0])
        elif record:
            several.append(record)
    return alone, several


def person_gradient(per_example: PerExample, rows: Sequence[Example]) -> Vector:
    """Return the sum of the gradients of one person's rows, (d,) float64, not clipped.

    Args:
        per_example: Gives the gradients.
        rows: The person's examples.

    Guarantee:
        A function of this person's rows alone: no other row is in a pass with them. A row
        that the model cannot take, or whose gradient is not finite, adds zero, and the
        person's other rows count.
    """
    total = np.zeros(sum(p.numel() for p in per_example.trained))
    # A row a pass: a pass of several is filled up with copies, and the rows of one person
    # are few and of many lengths.
    for gradients in per_example.gradients(rows, 1):
        for gradient in gradients.numpy():
            if np.isfinite(gradient).all():
                total += gradient
    return total
