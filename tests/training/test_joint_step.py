"""The sum that leaves a client un-noised: what one record changes, and that nothing else tells."""

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from fedllm.adapters.adapted_model import AdaptedModel
from fedllm.adapters.nested import train_first_columns
from fedllm.adapters.peft_model import attach, initial_arrays
from fedllm.privacy.discrete_gaussian import integer_sensitivity
from fedllm.privacy.joint_sum import largest_batch, record_units
from fedllm.privacy.pads import integers_of, residues
from fedllm.privacy.record_ledger import RecordPlan
from fedllm.privacy.sealed_sum import sealed_grid
from fedllm.training.joint_step import batch_sum
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


def test_any_one_row_changes_a_sealed_sum_by_at_most_what_the_trustees_noise_is_for(
    client, examples, sum_of
):
    grid = sealed_grid(Z, 3, 1, largest_batch(B), client.spec.num_trainable)
    units = grid.sensitivity
    whole = sum_of(examples, units=units)

    for index in range(len(examples)):
        left_out = examples[:index] + examples[index + 1 :]
        change = whole - sum_of(left_out, units=units)
        exact = sum(int(v) ** 2 for v in change)
        assert (0.999 * units) ** 2 < exact <= units**2
        # What travels is the sum modulo 2^32, of which nothing is lost.
        assert np.array_equal(integers_of(residues(change)), change)


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


def test_a_node_of_a_smaller_rank_adds_zero_to_the_columns_that_it_does_not_train(
    client, examples, tiny_chat_llama
):
    """On the same grid as all others, and with records of the same bound."""
    base = AutoModelForCausalLM.from_pretrained(tiny_chat_llama, dtype=torch.float32)
    model = attach(base.requires_grad_(False), client.spec).eval()
    rest = train_first_columns(model, client.spec, 1)
    narrow = AdaptedModel(model, client.tokenizer, client.spec, rest=rest)
    task = RoundTask(initial_arrays(client.spec), 1.0)

    sums = [
        batch_sum(narrow, records, CONFIG, EVERY, task).integers
        for records in (examples, examples[1:])
    ]

    assert {k: v.shape for k, v in sums[0].items()} == client.spec.trained_shapes
    assert not any(value[:, 1:].any() for value in sums[0].values())
    change = np.concatenate([(sums[0][n] - sums[1][n]).ravel() for n in sums[0]])
    units = record_units(client.spec.num_trainable, Z, B)
    assert 0.99 * units < length(change) <= units + 1
