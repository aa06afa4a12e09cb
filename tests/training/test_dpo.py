"""Direct preference optimisation beside TRL's own trainer, and what it leaves behind."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM
from trl import DPOConfig, DPOTrainer

from fedllm.adapters.peft_model import get_trained, set_trained
from fedllm.config import DataConfig, TrainConfig
from fedllm.data.tokens import tokenize
from fedllm.training.preference_loss import collate_pairs, pair_scores
from tests.helpers.clients import Client, Make, assert_same, preferences

PLAIN = TrainConfig(
    objective="dpo", dpo_beta=0.3, batch_size=4, local_steps=3, learning_rate=0.5
)


def with_pairs(client: Client) -> Client:
    """Return a client whose examples are preferences."""
    data = DataConfig(format="preference")
    found = tokenize(preferences(), client.tokenizer, data, 512)
    assert not found.unusable
    return replace(client, examples=found.examples)


@pytest.fixture(scope="module")
def client(make_client: Make) -> Client:
    return with_pairs(make_client())


def plain_dpo(
    client: Client, base: Path, folder: Path, **settings: Any
) -> tuple[DPOTrainer, dict[str, Any]]:
    """Train the same start with nothing but TRL, from text, with a second model beside it."""
    args = DPOConfig(
        output_dir=str(folder),
        **{
            "per_device_train_batch_size": 4,
            "max_steps": 3,
            "learning_rate": 0.5,
            "beta": 0.3,
            "optim": "sgd",
            "lr_scheduler_type": "constant",
            "max_grad_norm": 0.0,
            "activation_checkpointing": False,
            "seed": 1,
            **settings,
        },
        bf16=False,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    rows = [
        {
            "prompt": [{"role": "user", "content": row["prompt"]}],
            **{
                side: [{"role": "assistant", "content": row[side]}]
                for side in ("chosen", "rejected")
            },
        }
        for row in preferences()
    ]
    set_trained(client.model, client.spec, client.start())
    trainer = DPOTrainer(
        model=client.model,
        ref_model=AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
        args=args,
        train_dataset=Dataset.from_list(rows),
        processing_class=client.tokenizer,
    )
    trainer.train()
    return trainer, get_trained(client.model, client.spec)


@pytest.mark.parametrize("kind", ["ffa-lora", "lora-core", "lora", "ia3", "vera"])
def test_one_client_and_one_round_give_the_adapter_of_plain_dpo(
    make_client, tiny_chat_llama, tmp_path, kind
):
    _, wanted = plain_dpo(with_pairs(make_client(kind)), tiny_chat_llama, tmp_path)
    client = with_pairs(make_client(kind))

    got = client.train(PLAIN)

    assert_same(got.arrays, wanted, atol=1e-5)
    start = client.start()
    assert max(np.abs(got.arrays[n] - start[n]).max() for n in start) > 1e-4


def test_every_setting_together_gives_the_adapter_of_plain_dpo(
    make_client, tiny_chat_llama, tmp_path
):
    config = replace(
        PLAIN,
        batch_size=2,
        local_steps=0,
        local_epochs=2.0,
        gradient_accumulation=2,
        optimizer="adamw",
        learning_rate=0.01,
        warmup_steps=2,
        weight_decay=0.1,
        max_grad_norm=0.05,
    )
    _, wanted = plain_dpo(
        with_pairs(make_client()),
        tiny_chat_llama,
        tmp_path,
        per_device_train_batch_size=2,
        max_steps=-1,
        num_train_epochs=2.0,
        gradient_accumulation_steps=2,
        optim="adamw_torch",
        learning_rate=0.01,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=2,
        weight_decay=0.1,
        max_grad_norm=0.05,
    )

    got = with_pairs(make_client()).train(config)

    assert_same(got.arrays, wanted, atol=1e-5)


def test_the_mean_loss_is_that_of_plain_dpo(make_client, tiny_chat_llama, tmp_path):
    trainer, _ = plain_dpo(with_pairs(make_client()), tiny_chat_llama, tmp_path)

    got = with_pairs(make_client()).train(PLAIN)

    wanted = trainer.state.log_history[-1]["train_loss"]
    assert got.loss == pytest.approx(wanted, rel=1e-5)


def test_the_reference_is_the_base_in_every_round(client):
    """A copy of the round's adapter as the reference would begin at log 2 each time."""
    inputs = collate_pairs(client.examples, client.pad_token_id)

    client.set(client.start())
    later = pair_scores(client.model, inputs, 0.3).losses
    client.set({name: 0 * value for name, value in client.start().items()})
    first = pair_scores(client.model, inputs, 0.3).losses

    torch.testing.assert_close(first, torch.full_like(first, np.log(2)))
    assert (later - np.log(2)).abs().max() > 1e-3


def test_what_is_frozen_stays_frozen_and_nothing_is_left_on_the_model(client):
    """PEFT lets fixed factors require a gradient when it switches an adapter on again."""
    model = client.model
    frozen = {n: p.detach().clone() for n, p in model.named_parameters()}
    needs = {n for n, p in model.named_parameters() if p.requires_grad}

    client.train(PLAIN)

    assert {n for n, p in model.named_parameters() if p.requires_grad} == needs
    assert "ref" not in model.peft_config
    assert "forward" not in vars(model.get_base_model())
    for name, parameter in model.named_parameters():
        if name not in needs:
            assert torch.equal(parameter, frozen[name]), name


def test_fedprox_pulls_towards_the_rounds_adapter(client):
    start = client.start()

    def moved(mu: float) -> float:
        got = client.train(replace(PLAIN, proximal_mu=mu)).arrays
        return sum(float(((got[n] - start[n]) ** 2).sum()) for n in start)

    assert moved(1.0) < 0.9 * moved(0.0)


def test_compressed_activations_change_the_adapter_little(client):
    plain = client.train(PLAIN).arrays
    config = replace(PLAIN, activation_compression=True)

    got = client.train(config).arrays

    def distance(one: dict[str, Any], other: dict[str, Any]) -> float:
        return float(sum(((one[n] - other[n]) ** 2).sum() for n in one))

    # Of the way that the training went, squared.
    assert 0 < distance(got, plain) < 0.1 * distance(plain, client.start())
