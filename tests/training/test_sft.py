import logging
import socket
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers.trainer_callback import DefaultFlowCallback
from trl import SFTConfig, SFTTrainer

from fedllm.adapters.peft_model import get_trained, initial_arrays, set_trained
from fedllm.config import TrainConfig
from fedllm.models import loading
from fedllm.models.loading import load_base
from fedllm.training import sft
from fedllm.training.client_trainer import ClientTrainer
from fedllm.training.task import RoundTask
from tests.helpers.clients import PLAIN, Client, Make, assert_same, rows

KINDS = ["ffa-lora", "lora-core", "lora", "ia3", "vera"]


@pytest.fixture(scope="module")
def client(make_client: Make) -> Client:
    return make_client()


def difference(one: dict[str, Any], two: dict[str, Any]) -> float:
    """Return the largest distance between two adapters' values."""
    return max(float(np.abs(one[name] - two[name]).max()) for name in one)


def combined(*terms: tuple[float, dict[str, Any]]) -> dict[str, Any]:
    """Return the weighted sum of adapters."""
    return {name: sum(factor * a[name] for factor, a in terms) for name in terms[0][1]}


def widen(client: Client) -> None:
    """Bring trained values that SFTTrainer made bfloat16 back to float32."""
    for parameter in client.model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def plain_sft(
    client: Client, folder: Path, keep_float32: bool = True, **settings: Any
) -> dict[str, Any]:
    """Train the same start with nothing but TRL, from the questions as text."""
    settings = {
        "per_device_train_batch_size": 4,
        "max_steps": 3,
        "learning_rate": 0.5,
        "optim": "sgd",
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "activation_checkpointing": False,
        "seed": 1,
        **settings,
    }
    args = SFTConfig(
        output_dir=str(folder),
        bf16=not keep_float32,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **settings,
    )
    conversations = [
        {
            "prompt": [{"role": "user", "content": row["instruction"]}],
            "completion": [{"role": "assistant", "content": row["response"]}],
        }
        for row in rows()
    ]
    set_trained(client.model, client.spec, client.start())
    trainer = SFTTrainer(
        model=client.model,
        args=args,
        train_dataset=Dataset.from_list(conversations),
        processing_class=client.tokenizer,
    )
    if keep_float32:
        widen(client)
        set_trained(client.model, client.spec, client.start())
    trainer.train()
    widen(client)
    return get_trained(client.model, client.spec)


@pytest.mark.parametrize("kind", KINDS)
def test_one_client_and_one_round_give_the_adapter_of_plain_sft(
    make_client, tmp_path, kind
):
    wanted = plain_sft(make_client(kind), tmp_path)

    got = make_client(kind).train()

    assert_same(got.arrays, wanted)
    assert difference(got.arrays, make_client(kind).start()) > 1e-3


def test_every_setting_together_gives_the_adapter_of_plain_sft(make_client, tmp_path):
    config = TrainConfig(
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
    adapter = {"kind": "lora", "dropout": 0.2}
    wanted = plain_sft(
        make_client(**adapter),
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

    got = make_client(**adapter).train(config)

    assert got.num_steps == 6
    assert_same(got.arrays, wanted, atol=1e-5)


@pytest.fixture(scope="module")
def quantised(
    make_client: Make, tiny_chat_llama: Path, tmp_path_factory: pytest.TempPathFactory
) -> Make:
    """As make_client, on a 4-bit base that computes in float32."""
    home = tmp_path_factory.mktemp("home")

    def make(device: str = "cpu", **adapter: Any) -> Client:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(loading, "compute_dtype", lambda device: torch.float32)
            base = load_base(str(tiny_chat_llama), 4, home, device)
        return make_client(base=base, **adapter)

    return make


def test_on_a_4_bit_base_the_adapter_is_that_of_plain_sft_kept_in_float32(
    quantised, tmp_path
):
    wanted = plain_sft(quantised(), tmp_path)
    rounded = plain_sft(quantised(), tmp_path, keep_float32=False)

    got = quantised().train()

    assert_same(got.arrays, wanted, atol=1e-5)
    # SFTTrainer as it is rounds the adapter to bfloat16 there: near, and worse.
    assert 1e-4 < difference(got.arrays, rounded) < 1e-2


@pytest.mark.gpu
def test_on_a_gpu_the_adapter_is_that_of_a_cpu(quantised):
    wanted = quantised().train()

    got = quantised("cuda").train()

    assert_same(got.arrays, wanted.arrays, atol=1e-4)
    assert got.loss == pytest.approx(wanted.loss, rel=1e-3)


def test_a_client_that_sees_several_gpus_takes_one_batch_a_step(tmp_path):
    class Several(SFTConfig):
        def __post_init__(self) -> None:
            super().__post_init__()
            self._n_gpu = 4

    class Plain:
        def __init__(self, args: SFTConfig) -> None:
            self.batch_size = args.train_batch_size

    class Trainer(ClientTrainer, Plain):
        """As TRL's, which takes the size of a batch when it is made."""

    task = RoundTask({}, 0.5)
    args = Several(**sft._settings(PLAIN, task, str(tmp_path), "cpu", "constant"))
    assert args.train_batch_size == 4 * PLAIN.batch_size

    assert Trainer(args=args, proximal_mu=0.0).batch_size == PLAIN.batch_size


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_model_is_trained_on_its_own_device(tmp_path, device):
    task = RoundTask({}, 0.5)
    settings = sft._settings(PLAIN, task, str(tmp_path), device, "constant")

    assert settings["use_cpu"] == (device == "cpu")


def test_the_loss_is_the_mean_per_answer_token_before_each_step(client):
    config = replace(PLAIN, batch_size=10, local_steps=1)
    set_trained(client.model, client.spec, client.start())
    total, tokens = 0.0, 0
    for example in client.examples:
        ids, labels = (torch.tensor([example[k]]) for k in ("input_ids", "labels"))
        with torch.no_grad():
            logits = client.model(input_ids=ids).logits
        count = int((labels != -100).sum())
        total += count * float(
            torch.nn.functional.cross_entropy(logits[0, :-1], labels[0, 1:])
        )
        tokens += count

    got = client.train(config)

    assert got.loss == pytest.approx(total / tokens, rel=1e-4)
    assert got.num_examples == 10


@pytest.mark.parametrize("kind", KINDS)
def test_training_lowers_the_loss_with_every_kind(make_client, kind):
    client = make_client(kind)
    # A random model's gradients are small, and of another size for each kind.
    config = TrainConfig(
        batch_size=10, local_steps=1, optimizer="adamw", learning_rate=0.05
    )
    losses, arrays = [], initial_arrays(client.spec)

    for _ in range(10):
        trained = client.train(config, arrays=arrays)
        arrays, losses = trained.arrays, [*losses, trained.loss]

    assert losses[0] == pytest.approx(np.log(384), abs=0.5)
    assert losses[-1] < losses[0] - 0.02


def test_the_same_seed_gives_the_same_adapter_and_another_seed_another(client):
    one, same, other = (client.train(seed=seed) for seed in (1, 1, 2))

    assert difference(one.arrays, same.arrays) == 0
    assert difference(one.arrays, other.arrays) > 1e-4


def test_training_starts_from_the_given_values_alone(client):
    first = client.train()
    client.train(arrays=client.start(9))

    assert difference(client.train().arrays, first.arrays) == 0


@pytest.mark.parametrize("accumulation", [1, 2, 5])
def test_fedprox_adds_mu_times_the_distance_moved_to_the_gradient(client, accumulation):
    # With the whole data in every step, plain SGD from w0 visits w1 and w2; the pull is
    # zero at w0, so the second step ends at w2 - lr * mu * (w1 - w0).
    rate, mu = 0.5, 0.3
    config = TrainConfig(
        batch_size=10 // accumulation,
        gradient_accumulation=accumulation,
        learning_rate=rate,
    )
    one = client.train(replace(config, local_steps=1)).arrays
    two = client.train(replace(config, local_steps=2)).arrays

    got = client.train(replace(config, local_steps=2, proximal_mu=mu)).arrays

    way = combined((1.0, one), (-1.0, client.start()))
    assert_same(got, combined((1.0, two), (-rate * mu, way)))
    assert rate * mu * difference(one, client.start()) > 1e-3


def test_fedprox_keeps_the_adapter_nearer_to_where_it_started(client):
    config = replace(PLAIN, local_steps=6)
    ways = [
        difference(client.train(replace(config, proximal_mu=mu)).arrays, client.start())
        for mu in (0.0, 0.3, 1.0)
    ]

    assert ways[0] > ways[1] > ways[2]


def test_fedprox_leaves_no_pull_for_the_next_training(client):
    plain = client.train()
    client.train(replace(PLAIN, proximal_mu=1.0), arrays=client.start(9))

    assert difference(client.train().arrays, plain.arrays) == 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_weight_decay_takes_its_share_of_every_trained_value(
    make_client, kind, optimizer
):
    client = make_client(kind)
    config = replace(PLAIN, local_steps=1, learning_rate=0.1, optimizer=optimizer)
    without = client.train(config).arrays

    got = client.train(replace(config, weight_decay=0.2)).arrays

    assert_same(got, combined((1.0, without), (-0.1 * 0.2, client.start())))


def test_warm_up_starts_at_zero_and_grows(client):
    whole = replace(PLAIN, batch_size=10, learning_rate=0.4)
    half_step = client.train(replace(whole, local_steps=1, learning_rate=0.2)).arrays

    idle = client.train(replace(whole, local_steps=1, warmup_steps=2)).arrays
    warm = client.train(replace(whole, local_steps=2, warmup_steps=2)).arrays

    assert difference(idle, client.start()) == 0
    assert_same(warm, half_step)


def test_the_gradient_of_a_step_is_clipped_to_its_norm(client):
    config = replace(PLAIN, local_steps=1, learning_rate=2.0, max_grad_norm=1e-3)

    way = combined((1.0, client.train(config).arrays), (-1.0, client.start()))

    norm = np.sqrt(
        sum(float((value.astype(float) ** 2).sum()) for value in way.values())
    )
    assert norm == pytest.approx(2.0 * 1e-3, rel=1e-2)


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_accumulation_equals_the_large_batch(client, batch_size):
    whole = client.train(replace(PLAIN, batch_size=10, local_steps=2))
    parts = TrainConfig(
        batch_size=batch_size,
        gradient_accumulation=10 // batch_size,
        local_steps=2,
        learning_rate=0.5,
    )

    got = client.train(parts)

    assert got.num_steps == 2
    assert_same(got.arrays, whole.arrays, atol=1e-5)
    assert got.loss == pytest.approx(whole.loss, rel=1e-4)


@pytest.mark.parametrize(
    ("epochs", "accumulation", "steps"),
    [(1.0, 1, 3), (2.0, 1, 6), (0.5, 1, 2), (1.0, 2, 2)],
)
def test_epochs_count_if_no_steps_are_set(client, epochs, accumulation, steps):
    config = replace(
        PLAIN, local_steps=0, local_epochs=epochs, gradient_accumulation=accumulation
    )

    assert client.train(config).num_steps == steps


def test_a_client_with_fewer_examples_than_the_batch_takes_its_steps(client):
    config = replace(PLAIN, batch_size=16, local_steps=2)

    got = client.train(config, examples=client.examples[:3])
    one = client.train(config, examples=client.examples[:1])

    assert (got.num_steps, got.num_examples) == (2, 3)
    assert (one.num_steps, one.num_examples) == (2, 1)
    assert difference(one.arrays, client.start()) > 1e-4


def test_gradient_checkpointing_changes_the_memory_and_not_the_adapter(make_client):
    client = make_client()
    plain = client.train()
    calls = []
    # Early in the layer: what the backward pass can do without is not recomputed.
    layer = client.model.get_base_model().model.layers[1].input_layernorm
    layer.register_forward_hook(lambda *_: calls.append(1))

    checkpointed = client.train(replace(PLAIN, gradient_checkpointing=True))
    recomputed = len(calls)

    assert recomputed == 2 * PLAIN.local_steps
    assert_same(checkpointed.arrays, plain.arrays)


def test_compressed_activations_change_the_adapter_a_little(make_client):
    client = make_client()
    plain = client.train()

    compressed = client.train(replace(PLAIN, activation_compression=True))

    moved = difference(plain.arrays, client.start())
    assert 0 < difference(compressed.arrays, plain.arrays) < 0.05 * moved
    assert compressed.loss == pytest.approx(plain.loss, rel=1e-3)


def test_gradient_checkpointing_ends_with_the_training(make_client):
    client = make_client()
    layer = client.model.get_base_model().model.layers[1].input_layernorm
    hooks = sum(len(module._forward_hooks) for module in client.model.modules())
    for _ in range(3):
        client.train(replace(PLAIN, gradient_checkpointing=True))
    left = sum(len(module._forward_hooks) for module in client.model.modules())
    calls = []
    layer.register_forward_hook(lambda *_: calls.append(1))

    client.train()

    assert left <= hooks + 1  # what makes the embedded tokens need a gradient
    assert len(calls) == PLAIN.local_steps


def test_nothing_is_left_on_disk_and_nothing_is_reported(client, tmp_path, monkeypatch):
    (tmp_path / "tmp").mkdir()
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    callbacks = []
    train = sft.AdapterTrainer.train

    def spy(trainer: Any) -> Any:
        callbacks.extend(trainer.callback_handler.callbacks)
        return train(trainer)

    def connect(*args: Any) -> None:
        raise AssertionError("a connection")

    monkeypatch.setattr(sft.AdapterTrainer, "train", spy)
    monkeypatch.setattr(socket.socket, "connect", connect)

    client.train()

    kinds = {type(callback) for callback in callbacks}
    assert kinds == {DefaultFlowCallback, sft._Deadline}
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["tmp", "work"]


def test_training_shows_nothing(client, capfd, caplog):
    with caplog.at_level(logging.WARNING):
        client.train()

    out, err = capfd.readouterr()
    assert (out, err) == ("", "")
    assert caplog.records == []
