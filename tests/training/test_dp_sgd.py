"""DP-SGD on one client: what a step releases, and what it does with it."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM

from fedllm.adapters.adapted_model import AdaptedModel
from fedllm.adapters.peft_model import attach, initial_arrays
from fedllm.adapters.resolve import adapter_spec
from fedllm.auditing.harness import ZeroNoise
from fedllm.config import (
    AdapterConfig,
    DataConfig,
    PrivacyConfig,
    RunConfig,
    TrainConfig,
)
from fedllm.data.tokens import tokenize
from fedllm.errors import ConfigError
from fedllm.models.loading import load_base, load_tokenizer
from fedllm.models.location import load_config
from fedllm.privacy.mechanism import SecureGenerator
from fedllm.privacy.record_ledger import RecordPlan
from fedllm.training import dp_sgd
from fedllm.training.dp_sgd import (
    clipped_sum,
    train_privately,
)
from fedllm.training.per_example_gradients import PerExample
from fedllm.training.task import RoundTask
from tests.helpers.tiny_models import SENTENCES

PLAIN = TrainConfig(batch_size=4, learning_rate=1.0)
# Everyone is in the batch, and the noise is not seen.
QUIET = RecordPlan(1e-9, 1.0, 1, 10, 1e-5)
Run = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def examples(tiny_chat_llama: Path) -> list[dict[str, Any]]:
    rows = [{"instruction": t[:20], "response": t[20:]} for t in SENTENCES]
    tokenizer = load_tokenizer(str(tiny_chat_llama))
    return tokenize(Dataset.from_list(rows), tokenizer, DataConfig(), 512).examples


@pytest.fixture(scope="module")
def client(tiny_chat_llama: Path) -> AdaptedModel:
    return make_client(tiny_chat_llama)


def make_client(folder: Path, base: Any = None, **adapter: Any) -> AdaptedModel:
    if base is None:
        base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        base.requires_grad_(False)
    spec = adapter_spec(AdapterConfig(rank=4, **adapter), load_config(str(folder)), 5)
    model, tokenizer = attach(base, spec).eval(), load_tokenizer(str(folder))
    return AdaptedModel(model, tokenizer, spec)


def start(spec: Any) -> dict[str, Any]:
    draw = np.random.default_rng(0)
    return {
        name: (value + draw.normal(0, 0.05, value.shape)).astype(np.float32)
        for name, value in initial_arrays(spec).items()
    }


def moved(
    client: AdaptedModel,
    examples: list[Any],
    plan: RecordPlan = QUIET,
    config: TrainConfig = PLAIN,
    norm: float = 100.0,
) -> Any:
    """Return (d,) trained values after minus before."""
    arrays = start(client.spec)
    settings = RunConfig(train=config, privacy=PrivacyConfig(max_grad_norm=norm))
    task = RoundTask(arrays, config.learning_rate)
    is_quiet = plan.noise_multiplier == QUIET.noise_multiplier
    with patch.object(
        dp_sgd, "SecureGenerator", ZeroNoise if is_quiet else SecureGenerator
    ):
        trained = train_privately(client, examples, settings, plan, task)
    assert math.isnan(trained.loss)
    return np.concatenate(
        [(trained.arrays[n].astype(np.float64) - arrays[n]).ravel() for n in arrays]
    )


def gradients(client: AdaptedModel, examples: list[dict[str, Any]]) -> Any:
    """Return (examples, d) gradients at the start, in the order of the arrays."""
    client.set(start(client.spec))
    rows = list(PerExample(client.model, 0).gradients(examples, 4))
    return torch.cat(rows).double().numpy()


def test_a_quiet_step_is_one_of_sgd_on_the_mean_of_the_examples_gradients(
    client, examples
):
    wanted = -gradients(client, examples).mean(0)

    got = moved(client, examples)

    assert np.linalg.norm(wanted) > 1e-2
    np.testing.assert_allclose(got, wanted, atol=1e-6)


@pytest.mark.parametrize("quantization", [0, 4])
def test_every_gradient_is_clipped_before_it_is_summed(
    tiny_chat_llama, tmp_path, examples, quantization
):
    base = None
    if quantization:
        base = load_base(str(tiny_chat_llama), quantization, tmp_path, "cpu")
    client = make_client(tiny_chat_llama, base)
    rows = gradients(client, examples)
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    norm = float(np.median(norms))
    wanted = -(rows * np.minimum(1, norm / norms)).mean(0)

    got = moved(client, examples, norm=norm)

    assert norms.max() > norm > norms.min()
    assert np.linalg.norm(wanted + rows.mean(0)) > 1e-3
    np.testing.assert_allclose(got, wanted, atol=1e-6)


def test_one_example_more_changes_the_sum_by_no_more_than_the_norm(client, examples):
    gradients(client, examples)
    per_example = PerExample(client.model, 0)
    norm = 1e-3
    whole = clipped_sum(per_example, examples, 4, norm, 1.0).total()

    for index in range(len(examples)):
        rest = examples[:index] + examples[index + 1 :]
        without = clipped_sum(per_example, rest, 4, norm, 1.0).total()
        assert 0.5 * norm < np.linalg.norm(whole - without) <= norm * (1 + 1e-6)


def no_gradients(self: Any, examples: Any, micro_batch_size: int) -> Any:
    for _ in examples:
        yield torch.zeros(1, sum(p.numel() for p in self.trained))


def test_the_noise_of_a_step_has_the_promised_scale(client, examples, monkeypatch):
    """Through the real path: gradients of zero, one step, what the adapter moved by."""
    monkeypatch.setattr(PerExample, "gradients", no_gradients)
    plan = RecordPlan(1.5, 0.5, 1, 8, 1e-5)
    wanted = 1.5 * 2.0 / 8

    values = np.concatenate([moved(client, examples, plan, norm=2.0) for _ in range(4)])

    # The spread of n normal values is known to 1/sqrt(2n) of itself.
    tolerance = 3 / math.sqrt(2 * len(values))
    assert tolerance < 0.05
    assert np.std(values) == pytest.approx(wanted, rel=tolerance + 1e-3)
    assert abs(np.mean(values)) < 4 * wanted / math.sqrt(len(values))


def test_steps_add_their_noise_and_no_draw_is_repeated(client, examples, monkeypatch):
    monkeypatch.setattr(PerExample, "gradients", no_gradients)
    plan = RecordPlan(1.0, 0.5, 1, 8, 1e-5)
    torch.manual_seed(0)
    one = moved(client, examples, plan)
    torch.manual_seed(0)
    two = moved(client, examples, plan)
    nine = moved(client, examples, replace(plan, steps=9))

    assert abs(np.corrcoef(one, two)[0, 1]) < 0.2
    assert np.std(nine) == pytest.approx(3 * np.std(one), rel=0.15)


def test_an_empty_batch_is_a_step_of_noise(client, examples):
    plan = RecordPlan(1.0, 1e-12, 1, 8, 1e-5)

    got = moved(client, examples, plan, norm=0.5)

    assert np.std(got) == pytest.approx(0.5 / 8, rel=0.15)


def test_the_divisor_is_the_expected_batch_never_the_drawn_one(client, examples):
    got = moved(client, examples, RecordPlan(1e-9, 1.0, 1, 40, 1e-5))

    np.testing.assert_allclose(got, moved(client, examples) / 4, atol=1e-6)


def test_batches_are_poisson(client, examples, monkeypatch):
    sizes, seen = [], []

    def count(self: Any, batch: Any, micro_batch_size: int) -> Any:
        sizes.append(len(batch))
        seen.extend(examples.index(e) for e in batch)
        return iter(())

    monkeypatch.setattr(PerExample, "gradients", count)

    moved(client, examples, RecordPlan(1.0, 0.3, 2000, 3, 1e-5))

    # Binomial(10, 0.3): mean 3, variance 2.1; a fixed size would have none.
    assert np.mean(sizes) == pytest.approx(3, abs=4 * math.sqrt(2.1 / 2000))
    assert np.var(sizes) == pytest.approx(2.1, rel=0.2)
    shares = np.bincount(seen, minlength=10) / 2000
    assert np.abs(shares - 0.3).max() < 4.5 * math.sqrt(0.21 / 2000)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_an_example_without_a_finite_gradient_counts_as_zero(
    client, examples, monkeypatch, value
):
    real = PerExample.gradients
    rows = gradients(client, examples)
    wanted = -rows[1:].sum(0) / 10

    def sick(self: Any, batch: Any, micro_batch_size: int) -> Any:
        first = True
        for part in real(self, batch, micro_batch_size):
            if first:
                part[0, 3] = value
                first = False
            yield part

    monkeypatch.setattr(PerExample, "gradients", sick)

    got = moved(client, examples)

    np.testing.assert_allclose(got, wanted, atol=1e-6)


def test_optimiser_warmup_decay_and_pull_come_after_the_noise():
    """Against a plain loop over the noised gradient."""
    config = TrainConfig(
        batch_size=4,
        optimizer="adamw",
        learning_rate=0.01,
        warmup_steps=2,
        weight_decay=0.1,
        max_grad_norm=0.05,
        proximal_mu=0.5,
    )
    draw = np.random.default_rng(3)
    noised = [draw.normal(0, 1, 6) for _ in range(4)]
    parameter = torch.nn.Parameter(torch.linspace(-1, 1, 6).reshape(2, 3))
    twin = torch.nn.Parameter(parameter.detach().clone())
    reference = twin.detach().clone()
    update = dp_sgd._Update([parameter], config, 0.01)
    optimizer = torch.optim.AdamW([twin], lr=0.01, weight_decay=0.1)

    for step, gradient in enumerate(noised):
        update.step(gradient)
        optimizer.param_groups[0]["lr"] = 0.01 * min(1.0, step / 2)
        twin.grad = torch.tensor(gradient.reshape(2, 3), dtype=torch.float32)
        twin.grad += 0.5 * (twin.detach() - reference)
        twin.grad *= min(1.0, 0.05 / float(twin.grad.norm()))
        optimizer.step()

    assert float((twin.detach() - reference).abs().max()) > 1e-3
    torch.testing.assert_close(parameter, twin, atol=1e-6, rtol=1e-4)


def test_dropout_is_refused(tiny_chat_llama, examples):
    client = make_client(tiny_chat_llama, dropout=0.5)

    with pytest.raises(ConfigError, match=r"Dropout\(0.5\)"):
        moved(client, examples)


def test_a_base_with_dropout_of_its_own_is_refused(tiny_chat_llama, examples):
    client = make_client(tiny_chat_llama)
    client.model.config.attention_dropout = 0.1

    with pytest.raises(ConfigError, match="attention_dropout=0.1"):
        moved(client, examples)


def test_a_record_without_an_example_takes_its_coin_and_adds_nothing(
    client, examples, monkeypatch
):
    tossed = []
    toss = SecureGenerator.bernoulli

    def coins(self: Any, probability: float, size: int) -> Any:
        tossed.append(size)
        return toss(self, probability, size)

    monkeypatch.setattr(SecureGenerator, "bernoulli", coins)
    wanted = moved(client, examples[:6])

    got = moved(client, [None, *examples[:6], None, None])

    assert tossed == [6, 9]
    np.testing.assert_allclose(got, wanted, atol=1e-6)


def test_records_without_any_example_are_steps_of_noise(client):
    got = moved(client, [None] * 8, RecordPlan(1.0, 0.5, 1, 8, 1e-5), norm=0.5)

    assert np.std(got) == pytest.approx(0.5 / 8, rel=0.15)


def test_a_token_that_the_model_lacks_makes_an_example_that_adds_nothing(
    client, examples
):
    foreign = {**examples[0], "input_ids": [9999, *examples[0]["input_ids"][1:]]}
    wanted = moved(client, examples[1:])

    got = moved(client, [foreign, *examples[1:]])

    np.testing.assert_allclose(got, wanted, atol=1e-6)


def test_the_model_is_left_as_it_was(client, examples):
    model = client.model
    hooks = {m: len(m._forward_hooks) for m in model.modules()}

    moved(client, examples, config=replace(PLAIN, gradient_checkpointing=True))

    assert {m: len(m._forward_hooks) for m in model.modules()} == hooks
    assert not model.get_base_model().is_activation_checkpointing
    assert not model.training
    assert all(p.grad is None for p in model.parameters())
