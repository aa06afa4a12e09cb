"""The sum that leaves a client un-noised: what one record changes, and that nothing else tells."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM

from fedllm.adapters.adapted_model import AdaptedModel
from fedllm.adapters.peft_model import attach, initial_arrays
from fedllm.adapters.resolve import adapter_spec
from fedllm.config import (
    AdapterConfig,
    DataConfig,
    PrivacyConfig,
    RunConfig,
    TrainConfig,
)
from fedllm.data.tokens import tokenize
from fedllm.models.loading import load_tokenizer
from fedllm.models.location import load_config
from fedllm.privacy.discrete_gaussian import integer_sensitivity
from fedllm.privacy.joint_sum import record_units
from fedllm.privacy.record_ledger import RecordPlan
from fedllm.training.joint_step import batch_sum
from fedllm.training.task import RoundTask
from tests.helpers.tiny_models import SENTENCES

Z, B, NORM = 1.1, 16, 0.05
# Every coin falls for its record, so that two sums differ by records alone.
EVERY = RecordPlan(Z, 1.0, 1, B, 1e-5)
CONFIG = RunConfig(
    train=TrainConfig(batch_size=2), privacy=PrivacyConfig(max_grad_norm=NORM)
)
Sum = Callable[..., Any]


@pytest.fixture(scope="module")
def client(tiny_chat_llama: Path) -> AdaptedModel:
    base = AutoModelForCausalLM.from_pretrained(tiny_chat_llama, dtype=torch.float32)
    base.requires_grad_(False)
    folder = str(tiny_chat_llama)
    spec = adapter_spec(AdapterConfig(rank=4), load_config(folder), 5)
    return AdaptedModel(attach(base, spec).eval(), load_tokenizer(folder), spec)


@pytest.fixture(scope="module")
def examples(client: AdaptedModel) -> list[dict[str, Any]]:
    rows = [{"instruction": t[:20], "response": t[20:]} for t in SENTENCES]
    return tokenize(
        Dataset.from_list(rows), client.tokenizer, DataConfig(), 512
    ).examples


@pytest.fixture(scope="module")
def sum_of(client: AdaptedModel) -> Sum:
    task = RoundTask(initial_arrays(client.spec), 1.0)

    def summed(records: Any, plan: RecordPlan = EVERY) -> Any:
        named = batch_sum(client, records, CONFIG, plan, task).integers
        assert {k: v.shape for k, v in named.items()} == client.spec.trained_shapes
        assert {v.dtype for v in named.values()} == {np.dtype(np.int64)}
        return np.concatenate([named[name].ravel() for name in named])

    return summed


def length(integers: Any) -> int:
    """Return the exact norm of integers, rounded up."""
    return math.isqrt(sum(int(v) ** 2 for v in integers)) + 1


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
