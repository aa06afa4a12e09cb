"""Per-example gradients against autograd on each example alone."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import AutoConfig, AutoModelForCausalLM

from fedllm.adapters.nested import train_first_columns
from fedllm.adapters.peft_model import attach, initial_arrays, set_trained
from fedllm.adapters.resolve import adapter_spec
from fedllm.config import AdapterConfig, DataConfig
from fedllm.data.tokens import tokenize
from fedllm.models import loading
from fedllm.models.answer_loss import answer_losses, collate
from fedllm.models.fast_paths import FastPaths, fast_paths
from fedllm.models.loading import load_base, load_tokenizer
from fedllm.models.location import load_config
from fedllm.training import per_example_gradients
from fedllm.training.per_example_gradients import MODEL_TYPES, PerExample
from tests.helpers.tiny_models import SENTENCES

KINDS = ["ffa-lora", "lora-core", "lora"]
PAD = 0
Make = Callable[..., Any]


@pytest.fixture(autouse=True)
def no_trial_yet() -> None:
    """Forget what was tried of a model that tests share."""
    per_example_gradients._trials.clear()


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
    make_model, examples, monkeypatch
):
    """In bfloat16 a larger model rounds by the shape of a batch."""
    monkeypatch.setattr(PerExample, "_try", lambda *_: True)
    model = make_model("lora")
    # Its trial, at a model's first use, has a mask.
    fast_paths(model.get_base_model())
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


TINY = {
    "vocab_size": 384,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}


def tiny_model(model_type: str, dtype: Any = torch.float32, **more: Any) -> Any:
    """Return a random model of a type, with an adapter on q_proj and v_proj."""
    config = AutoConfig.for_model(model_type, **TINY, **more)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        base = AutoModelForCausalLM.from_config(config, dtype=dtype)
    base.requires_grad_(False)
    spec = adapter_spec(AdapterConfig(rank=4), base.config, 5)
    model = attach(base, spec)
    draw = np.random.default_rng(0)
    arrays = initial_arrays(spec)
    set_trained(
        model, spec, {n: v + draw.normal(0, 0.1, v.shape) for n, v in arrays.items()}
    )
    return model.train()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_every_model_of_the_list_keeps_examples_apart(examples, model_type, dtype):
    model = tiny_model(model_type, dtype)
    per_example = PerExample(model, PAD)
    ordered = sorted_by_length(examples)

    among = torch.cat(list(per_example.gradients(ordered, 4)))

    assert per_example._keeps_apart(16, 4)
    for index in range(len(ordered)):
        fewer = ordered[:index] + ordered[index + 1 :]
        without = torch.cat(list(per_example.gradients(fewer, 4)))
        assert torch.equal(without, among[[i for i in range(10) if i != index]])
    assert relative_error(among.float(), alone(model, examples).float()) < (
        1e-5 if dtype == torch.float32 else 0.2
    )


@pytest.mark.parametrize(
    ("model_type", "more"),
    [
        ("mixtral", {"num_local_experts": 4}),
        ("gemma", {}),
        ("phi3", {"pad_token_id": 0}),
    ],
)
def test_a_model_that_is_not_on_the_list_gets_one_example_a_pass(
    examples, monkeypatch, model_type, more
):
    if model_type == "phi3":
        more = {**more, "rope_scaling": None}
    config = AutoConfig.for_model(model_type, **TINY, **more)
    model = AutoModelForCausalLM.from_config(config).train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("o_proj" in name)
    model.get_base_model = lambda: model
    monkeypatch.setattr(PerExample, "_pass", None)

    rows = list(PerExample(model, PAD).gradients(examples[:3], 4))

    assert [len(row) for row in rows] == [1, 1, 1]


def test_a_head_that_changes_its_scores_gets_one_example_a_pass(
    make_model, examples, monkeypatch
):
    monkeypatch.setattr(
        per_example_gradients,
        "fast_paths",
        lambda base: FastPaths(head=False, packing=False),
    )
    model = make_model("ffa-lora")

    rows = list(PerExample(model, PAD).gradients(examples[:3], 4))

    assert [len(part) for part in rows] == [1, 1, 1]
    wanted = alone(model, sorted_by_length(examples[:3]))
    assert relative_error(torch.cat(rows), wanted) < 1e-4


@pytest.mark.parametrize("where", ["place", "company"])
@pytest.mark.parametrize("size", [2, 3, 4])
def test_a_device_whose_bits_depend_on_the_batch_gets_one_example_a_pass(
    make_model, examples, monkeypatch, where, size
):
    model = make_model("ffa-lora")
    honest = PerExample._pass

    def sick(self: Any, batch: Any) -> torch.Tensor:
        rows = honest(self, batch)
        tokens = sum(sum(example["input_ids"]) for example in batch)
        for place in range(len(batch)):
            rows[place, 0] += 1e-6 * (place if where == "place" else tokens)
        return rows

    wanted = torch.cat([PerExample(model, PAD)._one(e) for e in examples[:4]])
    monkeypatch.setattr(PerExample, "_pass", sick)

    got = torch.cat(list(PerExample(model, PAD).gradients(examples[:4], size)))

    order = [examples[:4].index(e) for e in sorted_by_length(examples[:4])]
    assert torch.equal(got, wanted[order])


class Counted(PerExample):
    """Notes its trials; a length of 32 fails."""

    tried: list[int]

    def _try(self, length: int, size: int) -> bool:
        self.tried.append(length)
        return length != 32

    def _pass(self, batch: Any) -> torch.Tensor:
        return torch.ones(len(batch), 1)

    def _one(self, example: Any) -> torch.Tensor:
        return torch.zeros(1, 1)


@pytest.mark.parametrize(
    ("device", "tried", "made"),
    [("cpu", [16], [1, 1, 1]), ("cuda", [16, 32, 48], [1, 0, 1])],
)
def test_an_accelerator_is_tried_at_each_length_once_in_a_process(
    make_model, device, tried, made
):
    model = make_model("ffa-lora")
    rows = [{"input_ids": [1] * n, "labels": [1] * n} for n in (48, 5, 20)]
    found = []
    for _ in range(2):
        per_example = Counted(model, PAD)
        per_example._device = SimpleNamespace(type=device)
        per_example.tried = found

        got = torch.cat(list(per_example.gradients(rows, 4)))

        assert got.flatten().tolist() == made
    assert found == tried


def test_a_trial_that_the_model_cannot_take_parts_the_examples(
    make_model, examples, monkeypatch
):
    def fail(self: Any, batch: Any) -> torch.Tensor:
        raise RuntimeError("no kernel for this length")

    monkeypatch.setattr(PerExample, "_pass", fail)

    rows = list(PerExample(make_model("ffa-lora"), PAD).gradients(examples, 4))

    assert [len(row) for row in rows] == [1] * 10


def test_an_example_that_fails_leaves_the_bits_of_the_others(
    make_model, examples, monkeypatch
):
    model = make_model("ffa-lora")
    among = together(model, examples, 4)
    ordered = sorted_by_length(examples)
    honest = PerExample._backward

    def fail(self: Any, batch: Any) -> None:
        if ordered[2] in batch:
            raise RuntimeError("index out of range")
        honest(self, batch)

    monkeypatch.setattr(PerExample, "_backward", fail)
    # A pass of another shape could round in another way.
    monkeypatch.setattr(PerExample, "_one", None)
    per_example = PerExample(model, PAD)

    got = torch.cat(list(per_example.gradients(examples, 4)))

    assert torch.equal(got, among[[i for i in range(10) if i != 2]])
    assert per_example.num_unfit == 1


def test_a_token_that_the_model_lacks_never_reaches_it(
    make_model, examples, monkeypatch
):
    """On an accelerator it would end the process."""
    monkeypatch.setattr(PerExample, "_backward", None)
    per_example = PerExample(make_model("ffa-lora"), PAD)

    assert not list(per_example.gradients([{**examples[0], "input_ids": [9999]}], 4))
    assert per_example.num_unfit == 1


@pytest.mark.parametrize("together", [True, False])
def test_running_out_of_memory_is_about_the_machine_and_is_raised(
    make_model, examples, monkeypatch, together
):
    def full(self: Any, batch: Any) -> None:
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(PerExample, "_try", lambda *_: together)
    per_example = PerExample(make_model("ffa-lora"), PAD)
    monkeypatch.setattr(PerExample, "_backward", full)

    with pytest.raises(torch.OutOfMemoryError):
        list(per_example.gradients(examples, 4))


def test_of_a_node_that_trains_the_first_columns_they_are_the_gradients_of_those(
    make_model, examples, tiny_chat_llama, monkeypatch
):
    whole, model = make_model("ffa-lora"), make_model("ffa-lora")
    config = load_config(str(tiny_chat_llama))
    spec = adapter_spec(AdapterConfig(kind="ffa-lora", rank=4), config, 5)
    train_first_columns(model, spec, 1)
    monkeypatch.setattr(PerExample, "_one", None)  # all of them in one pass

    got = together(model, examples, 4)

    wanted, start = alone(whole, examples), 0
    kept = []
    for shape in spec.trained_shapes.values():
        size = shape[0] * shape[1]
        columns = wanted[:, start : start + size].reshape(-1, *shape)
        kept.append(columns[:, :, 0])
        start += size
    assert relative_error(got, torch.cat(kept, 1)) < 1e-4
