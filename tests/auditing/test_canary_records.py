"""Canary examples in one client's records, on a small random model."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM

from fedllm.adapters.adapted_model import AdaptedModel
from fedllm.adapters.peft_model import attach
from fedllm.adapters.resolve import adapter_spec
from fedllm.auditing.canary_records import (
    ROWS_OF_A_PERSON,
    audit_first_client,
    audit_records,
    joint_plan,
    joint_step,
    most_certifiable,
)
from fedllm.auditing.harness import ZeroNoise
from fedllm.config import DataConfig, flat
from fedllm.config_parsing import parse_run_config
from fedllm.data.tokens import tokenize
from fedllm.models.loading import load_tokenizer
from fedllm.models.location import load_config
from fedllm.planning.joint_noise import joint_settings
from fedllm.planning.record_noise import client_plan
from fedllm.privacy.record_ledger import RecordPlan
from fedllm.strategy import server_noise
from fedllm.training import dp_sgd
from fedllm.training.dp_sgd import train_privately
from fedllm.training.task import RoundTask
from tests.helpers.rows import write_jsonl
from tests.helpers.tiny_models import SENTENCES

CONFIG = parse_run_config(
    {
        "privacy.unit": "record",
        "privacy.target-epsilon": 1.0,
        "adapter.kind": "lora",
        "adapter.target-modules": "all-linear",
        "num-server-rounds": 4,
        "train.local-steps": 8,
        "train.batch-size": 16,
        "train.optimizer": "adamw",
        "train.learning-rate": 0.02,
        "train.learning-rate-min": 0.02,
        "privacy.max-grad-norm": 1.0,
    }
)
CANARIES = 60


@pytest.fixture(scope="module")
def client(tiny_chat_llama: Path) -> tuple[AdaptedModel, Any]:
    base = AutoModelForCausalLM.from_pretrained(tiny_chat_llama, dtype=torch.float32)
    base.requires_grad_(False)
    spec = adapter_spec(CONFIG.adapter, load_config(str(tiny_chat_llama)), 5)
    rows = [{"instruction": t[:20], "response": t[20:]} for t in SENTENCES]
    tokenizer = load_tokenizer(str(tiny_chat_llama))
    examples = tokenize(Dataset.from_list(rows), tokenizer, DataConfig(), 512).examples
    return AdaptedModel(attach(base, spec).eval(), tokenizer, spec), examples


def audited(
    client: tuple[AdaptedModel, Any], trained_with: RecordPlan, num_rows: int = 1
) -> Any:
    """Audit what is promised, if the client trains by another plan.

    A canary is a person with so many rows.
    """
    adapted, examples = client
    promised = client_plan(CONFIG, len(examples) + CANARIES // 2, 1.0)

    def train(records: Any, arrays: Any) -> Any:
        task = RoundTask(arrays, 0.02)
        return train_privately(adapted, records, CONFIG, trained_with, task).arrays

    return audit_records(adapted, examples, CONFIG, promised, CANARIES, train, num_rows)


def test_what_keeps_its_promise_passes(client):
    promised = client_plan(CONFIG, len(client[1]) + CANARIES // 2, 1.0)

    found = audited(client, promised)

    assert 0.95 < found.accounted <= 1.0
    assert found.passed and found.certified.epsilon <= 1.0
    assert found.num_records == len(SENTENCES) and found.num_canaries == CANARIES


def test_training_without_noise_is_convicted(client):
    promised = client_plan(CONFIG, len(client[1]) + CANARIES // 2, 1.0)

    found = audited(client, replace(promised, noise_multiplier=1e-6, steps=30))

    assert found.fall_planted > found.fall_others + 0.1
    assert found.certified.epsilon > found.accounted
    assert not found.passed and found.as_dict()["passed"] is False


def test_a_bound_is_never_above_what_so_many_canaries_can_show():
    # With m guesses all right p is 2**-m at epsilon 0; the bound solves q**m = 0.05.
    assert most_certifiable(60, 0.0) == pytest.approx(2.97, abs=0.02)
    assert most_certifiable(200, 1e-5) < 5


JOINT = parse_run_config(
    {
        "privacy.unit": "record",
        "privacy.noise": "joint",
        "privacy.target-epsilon": 1.0,
        "adapter.kind": "lora",
        "adapter.target-modules": "all-linear",
        "num-server-rounds": 30,
        "train.local-steps": 1,
        "train.batch-size": 8,
        "train.gradient-accumulation": 4,
        "strategy.server-optimizer": "adam",
        "strategy.server-learning-rate": 0.02,
        "strategy.server-learning-rate-min": 0.02,
    }
)


def audited_jointly(client: tuple[AdaptedModel, Any], folder: Path) -> Any:
    adapted, examples = client
    rows = (len(examples) + CANARIES // 2, 5)
    settings = joint_settings(JOINT, rows, adapted.spec.num_trainable)
    step = joint_step(adapted, JOINT, settings, folder)
    plan = joint_plan(settings)
    return audit_records(adapted, examples, JOINT, plan, CANARIES, step)


def test_one_noise_for_all_passes_and_without_it_the_run_is_convicted(
    client, tmp_path, monkeypatch
):
    (tmp_path / "noised").mkdir()
    found = audited_jointly(client, tmp_path / "noised")

    assert 0.95 < found.accounted <= 1.0
    assert found.passed

    monkeypatch.setattr(server_noise, "SecureGenerator", ZeroNoise)
    found = audited_jointly(client, tmp_path)

    assert found.fall_planted > found.fall_others
    assert not found.passed and found.certified.epsilon > found.accounted


def test_canaries_that_are_persons_pass_and_without_noise_they_convict(client):
    promised = client_plan(CONFIG, len(client[1]) + CANARIES // 2, 1.0)

    assert audited(client, promised, num_rows=2).passed

    found = audited(
        client, replace(promised, noise_multiplier=1e-6, steps=30), num_rows=2
    )

    assert found.fall_planted > found.fall_others + 0.1
    assert not found.passed and found.certified.epsilon > found.accounted


def test_the_first_client_of_a_run_by_person_has_a_record_for_each(
    tiny_chat_llama, tmp_path, monkeypatch
):
    monkeypatch.setenv("FEDLLM_HOME", str(tmp_path / "home"))
    rows = [
        {"instruction": t[:20], "response": t[20:], "who": f"p{n // 2}"}
        for n, t in enumerate([*SENTENCES, *SENTENCES])
    ]
    config = parse_run_config(
        {
            **flat(CONFIG),
            "model.name": str(tiny_chat_llama),
            "model.quantization": 0,
            "data.name": str(write_jsonl(tmp_path / "rows.jsonl", rows)),
            "data.person-column": "who",
            "num-server-rounds": 1,
            "train.local-steps": 1,
            "train.batch-size": 2,
        }
    )
    sizes = []

    def watched(adapted: Any, records: Any, *rest: Any) -> Any:
        sizes.extend(len(record) for record in records)
        return train_privately(adapted, records, *rest)

    monkeypatch.setattr(dp_sgd, "train_privately", watched)

    found = audit_first_client(config, 1, 8)

    assert found.num_records == (len(rows) + 1) // 2
    assert sizes[: found.num_records] == [2] * found.num_records
    assert set(sizes[found.num_records :]) <= {ROWS_OF_A_PERSON}
