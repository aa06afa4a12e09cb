"""A person's rows are one record: one sum, one clip, one coin."""

import math
from typing import Any

import numpy as np
import pytest
import torch

from fedllm.adapters.peft_model import initial_arrays
from fedllm.privacy.joint_sum import record_units
from fedllm.privacy.mechanism import SecureGenerator
from fedllm.privacy.record_ledger import RecordPlan
from fedllm.training.dp_sgd import clipped_sum, drawn
from fedllm.training.joint_step import batch_sum
from fedllm.training.per_example_gradients import PerExample
from fedllm.training.person_gradients import person_gradient
from fedllm.training.task import RoundTask
from tests.helpers.batch_sums import (
    CONFIG,
    EVERY,
    B,
    Z,
    client,
    examples,
    length,
    sum_of,
)

__all__ = ["client", "examples", "sum_of"]

UNKNOWN = {"input_ids": [10**9, 1], "labels": [-100, 1]}


@pytest.fixture
def per_example(client: Any) -> PerExample:
    client.set(initial_arrays(client.spec))
    return PerExample(client.model, 0)


def row_gradients(per_example: PerExample, rows: Any) -> Any:
    parts = [list(per_example.gradients([row], 1)) for row in rows]
    return torch.cat([part for found in parts for part in found]).double().numpy()


@pytest.mark.parametrize("num_rows", [1, 2, 3, 12])
def test_any_one_person_changes_the_sum_by_at_most_one_clip_in_integers(
    client, examples, sum_of, num_rows
):
    """The rows of the person pull one way, and each is longer than the clip."""
    units = record_units(client.spec.num_trainable, Z, B)
    others = [tuple(examples[:2]), (examples[2],), tuple(examples[3:])]
    person = (examples[0],) * num_rows

    change = length(sum_of([*others, person]) - sum_of(others))

    assert 0.999 * units < change <= units + 1


def test_a_person_is_the_clipped_sum_of_their_rows_and_rows_are_not_clipped_first(
    per_example, examples
):
    rows = row_gradients(per_example, examples)
    large = 10 * float(np.linalg.norm(rows.sum(0)))
    small = float(np.linalg.norm(rows.sum(0))) / 3

    for norm in (large, small):
        total = clipped_sum(per_example, [tuple(examples)], 2, norm, 1.0).total()

        wanted = rows.sum(0) * min(1.0, norm / float(np.linalg.norm(rows.sum(0))))
        np.testing.assert_allclose(total, wanted, atol=1e-6 * norm)


def test_a_person_with_one_row_is_that_row_to_the_last_bit(sum_of, examples):
    persons = [(example,) for example in examples]

    np.testing.assert_array_equal(sum_of(persons), sum_of(examples))


def test_a_persons_gradient_is_the_same_in_any_company(sum_of, examples):
    one, two = tuple(examples[:2]), tuple(examples[2:])

    alone, other = sum_of([one]), sum_of([two])

    np.testing.assert_array_equal(sum_of([two, one]), alone + other)


def test_a_row_that_cannot_be_used_is_zero_and_the_person_is_not(
    per_example, sum_of, examples, monkeypatch
):
    whole = sum_of([tuple(examples[:2])])
    np.testing.assert_array_equal(sum_of([(UNKNOWN, *examples[:2])]), whole)
    assert not sum_of([(UNKNOWN, UNKNOWN)]).any()

    honest = PerExample.gradients

    def one_in_three_is_not_finite(self: Any, rows: Any, size: int) -> Any:
        for place, part in enumerate(honest(self, rows, size)):
            if place == 1:
                part[0, 0] = (math.nan, math.inf)[len(rows) % 2]
            yield part

    monkeypatch.setattr(PerExample, "gradients", one_in_three_is_not_finite)
    for rows in (examples[:3], examples[:2]):
        got = person_gradient(per_example, rows)
        ordered = sorted(rows, key=lambda row: len(row["input_ids"]))
        monkeypatch.undo()
        kept = row_gradients(per_example, ordered[:1] + ordered[2:])
        monkeypatch.setattr(PerExample, "gradients", one_in_three_is_not_finite)
        np.testing.assert_allclose(got, kept.sum(0), rtol=1e-6, atol=1e-12)


def test_no_more_than_one_row_of_a_person_is_held_at_a_time(
    per_example, examples, monkeypatch
):
    held = []
    honest = per_example.gradients

    def watched(rows: Any, size: int) -> Any:
        for part in honest(rows, size):
            held.append(len(part))
            yield part

    monkeypatch.setattr(per_example, "gradients", watched)
    person_gradient(per_example, examples * 3)

    assert held == [1] * (3 * len(examples))


def test_a_person_has_one_coin_for_all_rows(examples):
    persons = [tuple(examples)] * 400

    batch = drawn(persons, 0.5, SecureGenerator())

    # By chance outside once in 10^9.
    assert 140 < len(batch) < 260
    assert set(map(len, batch)) == {len(examples)}


def test_the_noised_step_of_a_client_takes_persons(client, examples):
    from fedllm.training.dp_sgd import train_privately

    plan = RecordPlan(0.5, 1.0, 1, 2, 1e-5)
    arrays = initial_arrays(client.spec)

    found = train_privately(
        client, [tuple(examples), None], CONFIG, plan, RoundTask(arrays, 1.0)
    )

    assert found.num_examples == 2
    joint = batch_sum(client, [None, ()], CONFIG, EVERY, RoundTask(arrays, 1.0))
    assert not any(part.any() for part in joint.integers.values())
