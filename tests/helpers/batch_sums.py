"""The sum that leaves a client un-noised, of a tiny model on which every coin falls."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
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
def examples(client: AdaptedModel) -> list[Any]:
    rows = [{"instruction": t[:20], "response": t[20:]} for t in SENTENCES]
    found = tokenize(rows, client.tokenizer, DataConfig(), 512).records
    assert None not in found
    return found


@pytest.fixture(scope="module")
def sum_of(client: AdaptedModel) -> Sum:
    task = RoundTask(initial_arrays(client.spec), 1.0)

    def summed(records: Any, plan: RecordPlan = EVERY, units: int | None = None) -> Any:
        named = batch_sum(client, records, CONFIG, plan, task, units).integers
        assert {k: v.shape for k, v in named.items()} == client.spec.trained_shapes
        assert {v.dtype for v in named.values()} == {np.dtype(np.int64)}
        return np.concatenate([named[name].ravel() for name in named])

    return summed


def length(integers: Any) -> int:
    """Return the exact norm of integers, rounded up."""
    return math.isqrt(sum(int(v) ** 2 for v in integers)) + 1
