"""Per-example gradients against autograd on each example alone."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM

from fedllm.adapters.peft_model import attach, initial_arrays, set_trained
from fedllm.adapters.resolve import adapter_spec
from fedllm.config import AdapterConfig, DataConfig
from fedllm.data.tokens import tokenize
from fedllm.models import loading
from fedllm.models.answer_loss import answer_losses, collate
from fedllm.models.loading import load_base, load_config, load_tokenizer
from fedllm.training.per_example_gradients import PerExample
from tests.helpers.tiny_models import SENTENCES

KINDS = ["ffa-lora", "lora-core", "lora"]
PAD = 0
Make = Callable[..., Any]


@pytest.fixture(scope="module")
def examples(tiny_chat_llama: Path) -> list[dict[str, Any]]:
    rows = [
        {"instruction": t[: 8 + i], "response": t[8 + i :]}
        for i, t in enumerate(SENTENCES)
    ]
    tokenizer = load_tokenizer(str(tiny_chat_llama))
    return tokenize(Dataset.from_list(rows), tokenizer, DataConfig(), 512).examples


@pytest.fixture
def make_model(tiny_chat_llama: Path, tmp_path: Path) -> Make:
    """Return a model with an adapter as after some rounds, in training mode."""

    def make(
        kind: str, quantization: int = 0, dtype: Any = torch.float32, **adapter: Any
    ) -> Any:
        folder = str(tiny_chat_llama)
        base: Any
        if quantization:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(loading, "compute_dtype", lambda device: dtype)
                base = load_base(folder, quantization, tmp_path, "cpu")
        else:
            base = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
            base.requires_grad_(False)
        config = AdapterConfig(kind=kind, rank=4, **adapter)
        spec = adapter_spec(config, load_config(folder), 5)
        model = attach(base, spec)
        draw = np.random.default_rng(0)
        start = {
            name: value + draw.normal(0, 0.1, value.shape)
            for name, value in initial_arrays(spec).items()
        }
        set_trained(model, spec, start)
        return model.train()

    return make


def alone(model: Any, examples: list[dict[str, Any]]) -> torch.Tensor:
    """Return each example's gradient by plain autograd, shortest example first."""
    trained = [p for p in model.parameters() if p.requires_grad]
    rows = []
    for example in sorted_by_length(examples):
        loss = answer_losses(model, **collate([example], PAD)).mean()
        gradients = torch.autograd.grad(loss, trained)
        rows.append(torch.cat([g.flatten() for g in gradients]))
    return torch.stack(rows)


def sorted_by_length(examples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(examples, key=lambda row: len(row["input_ids"]))


def together(model: Any, examples: list[dict[str, Any]], size: int) -> torch.Tensor:
    return torch.cat(list(PerExample(model, PAD).gradients(examples, size)))


def relative_error(got: torch.Tensor, wanted: torch.Tensor) -> float:
    """Return the largest error of a row over that row's norm."""
    assert float(wanted.norm(dim=1).min()) > 1e-3
    return float(((got - wanted).norm(dim=1) / wanted.norm(dim=1)).max())


@pytest.mark.parametrize("quantization", [0, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_each_example_alone(
    make_model, examples, monkeypatch, kind, quantization
):
    model = make_model(kind, quantization)
    wanted = alone(model, examples)
    monkeypatch.setattr(PerExample, "_one", None)  # all of them in one pass

    got = together(model, examples, 4)

    assert got.shape == wanted.shape
    assert relative_error(got, wanted) < 1e-5
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("quantization", [0, 4])
@pytest.mark.parametrize("kind", ["ia3", "vera"])
def test_gradients_of_kinds_that_are_no_linear_weights_are_right_too(
    make_model, examples, kind, quantization
):
    model = make_model(kind, quantization)

    got = together(model, examples, 4)

    assert relative_error(got, alone(model, examples)) < 1e-5
    assert torch.equal(got[:1], together(model, sorted_by_length(examples)[:1], 4))


def test_every_linear_layer_can_be_adapted(make_model, examples):
    model = make_model("lora", target_modules="all-linear")

    got = together(model, examples, 5)

    assert relative_error(got, alone(model, examples)) < 1e-5


def test_checkpointing_changes_nothing(make_model, examples):
    model = make_model("lora")
    wanted = alone(model, examples)
    model.get_base_model().activation_checkpointing_enable()

    got = together(model, examples, 4)

    assert relative_error(got, wanted) < 1e-5


def test_a_trained_value_that_is_no_linear_weight_is_served_one_by_one(
    make_model, examples
):
    model = make_model("ffa-lora")
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            parameter.requires_grad_(True)

    got = together(model, examples, 4)

    assert relative_error(got, alone(model, examples)) < 1e-5


def test_a_layer_that_does_not_see_examples_apart_is_served_one_by_one(
    make_model, examples
):
    model = make_model("ffa-lora")
    wanted = alone(model, examples)
    layer = model.get_base_model().model.layers[0].self_attn.q_proj.lora_B["default"]
    shapes = []

    def flat(module: Any, args: Any) -> Any:
        shapes.append(args[0].shape)
        return (args[0].flatten(0, -2),)

    def back(module: Any, args: Any, output: Any) -> Any:
        return output.unflatten(0, shapes[-1][:-1])

    layer.register_forward_pre_hook(flat)
    layer.register_forward_hook(back)

    got = together(model, examples, 4)

    assert relative_error(got, wanted) < 1e-5


def test_an_example_that_gives_nan_leaves_the_others_as_they_are(make_model, examples):
    model = make_model("ffa-lora")
    wanted = together(model, examples, 10)
    ordered = sorted_by_length(examples)
    # A token that only some examples have.
    token = next(t for t in ordered[3]["input_ids"] if t not in ordered[0]["input_ids"])
    sick = [i for i, row in enumerate(ordered) if token in row["input_ids"]]
    model.get_base_model().get_input_embeddings().weight.data[token] = float("nan")

    got = together(model, examples, 10)

    well = [i for i in range(10) if i not in sick]
    assert torch.equal(got[well], wanted[well])
    assert not torch.isfinite(got[sick]).all(1).any()


def test_no_examples_give_no_gradients(make_model):
    assert list(PerExample(make_model("lora"), PAD).gradients([], 4)) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("quantization", [0, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_a_gradient_is_the_same_to_the_last_bit_with_any_other_examples_in_the_batch(
    make_model, examples, kind, quantization, dtype
):
    """Else one record more changes the gradients of all the others."""
    model = make_model(kind, quantization, dtype)
    ordered = sorted_by_length(examples)
    among = together(model, examples, 4)

    for index, example in enumerate(ordered):
        fewer = [e for e in ordered if e is not example]
        without = together(model, fewer, 4)
        by_itself = together(model, [example], 4)

        assert torch.equal(by_itself[0], among[index])
        assert torch.equal(without, among[[i for i in range(10) if i != index]])


def test_a_pass_has_the_same_shape_and_no_mask_with_any_examples_in_the_batch(
    make_model, examples
):
    """In bfloat16 a larger model rounds by the shape of a batch."""
    model = make_model("lora")
    seen: list[Any] = []

    def note(module: Any, args: Any, kwargs: Any) -> None:
        assert kwargs.get("attention_mask") is None
        seen.append(tuple(kwargs["input_ids"].shape))

    model.get_base_model().base_model.register_forward_pre_hook(note, with_kwargs=True)

    together(model, examples, 4)
    among = set(seen)
    for example in examples:
        seen.clear()
        together(model, [example], 4)
        assert seen == [(4, -(-len(example["input_ids"]) // 16) * 16)]
        assert seen[0] in among
    assert len(among) > 1


@pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")
@pytest.mark.parametrize("kind", ["ffa-lora", "lora"])
def test_opacus_makes_the_same_gradients(make_model, examples, kind):
    from opacus import GradSampleModule

    model = make_model(kind)
    ours = torch.cat(list(PerExample(model, PAD).gradients(examples, 4)))
    ordered = sorted_by_length(examples)

    batch = collate(ordered, PAD)
    counts = (batch["labels"][:, 1:] != -100).sum(1)
    wrapped = GradSampleModule(model, loss_reduction="sum", strict=False)
    losses = answer_losses(model, **batch)
    owners = torch.repeat_interleave(torch.arange(len(ordered)), counts)
    (losses / counts[owners]).sum().backward()
    theirs = torch.cat(
        [p.grad_sample.flatten(1) for p in model.parameters() if p.requires_grad], 1
    )
    wrapped.remove_hooks()

    assert ours.abs().max() > 1e-3
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
