"""The sum that leaves a client un-noised: what one record changes, and that nothing else tells."""

import numpy as np

from fedllm.privacy.discrete_gaussian import integer_sensitivity
from fedllm.privacy.joint_sum import record_units
from fedllm.privacy.record_ledger import RecordPlan
from tests.helpers.batch_sums import B, Z, client, examples, length, sum_of

__all__ = ["client", "examples", "sum_of"]


def test_any_one_row_changes_the_sum_by_at_most_the_clip_norm_in_integers(
    client, examples, sum_of
):
    """All rows have longer gradients than the clip, so that each difference is near it."""
    size = client.spec.num_trainable
    units = record_units(size, Z, B)
    whole = sum_of(examples)
    for index in range(len(examples)):
        left_out = examples[:index] + examples[index + 1 :]
        one_more = [*examples, examples[index]]

        for neighbour in (sum_of(left_out), sum_of(one_more)):
            change = length(whole - neighbour)
            assert 0.999 * units < change <= units + 1 <= integer_sensitivity(Z)


def test_a_row_that_nothing_can_be_learned_from_changes_nothing(examples, sum_of):
    whole = sum_of(examples)
    unknown = {"input_ids": [10**9, 1], "labels": [-100, 1]}

    for row in (None, unknown):
        np.testing.assert_array_equal(sum_of([row, *examples]), whole)


def test_the_sum_is_the_same_in_any_order_of_the_rows(examples, sum_of):
    np.testing.assert_array_equal(sum_of(examples), sum_of(examples[::-1]))


def test_an_empty_batch_is_a_sum_of_zeros_of_the_same_form(examples, sum_of):
    nobody = RecordPlan(Z, 1e-300, 1, B, 1e-5)

    assert not sum_of(examples, nobody).any()
    assert not sum_of([]).any()


def test_every_row_has_a_coin_of_its_own(examples, sum_of):
    """Of 40 batches of half the rows, two alike have a probability below 0.1."""
    half = RecordPlan(Z, 0.5, 1, B, 1e-5)

    sums = {sum_of(examples, half).tobytes() for _ in range(12)}

    assert len(sums) > 6
