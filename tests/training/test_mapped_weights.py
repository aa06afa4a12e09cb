import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from fedllm.models.loading import load_base
from fedllm.training import mapped_weights
from fedllm.training.mapped_weights import mapped_ranges, release_mapped_pages

LAYERS = 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model whose layers are many pages each."""
    config = LlamaConfig(
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        vocab_size=64,
    )
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("model")
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    return path


@pytest.fixture
def model(folder, tmp_path):
    base = load_base(str(folder), 0, tmp_path, "cpu", in_float32=True)
    base.activation_checkpointing_enable()
    return base.train()


def in_memory(ranges):
    """Kilobytes of the mapped file that count as the process's."""
    found, wanted = 0, {f"{start:x}-{stop:x}" for start, stop in ranges}
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            inside = line.split()[0] in wanted
        elif inside and line.startswith("Rss:"):
            found += int(line.split()[1])
    return found


def step(model):
    """Return the embeddings' gradient, and the file in memory in the middle of each layer."""
    ids = torch.arange(24).reshape(2, 12)
    ranges, sizes = mapped_ranges(model), []
    hooks = [
        layer.mlp.up_proj.register_forward_hook(
            lambda *_: sizes.append(in_memory(ranges))
        )
        for layer in model.model.layers
    ]
    embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
    model(inputs_embeds=embedded).logits.square().sum().backward()
    for hook in hooks:
        hook.remove()
    return embedded.grad, sizes


def test_a_step_holds_one_layer_and_gives_the_same_gradient(model, folder):
    wanted, whole = step(model)
    with release_mapped_pages(model):
        got, sizes = step(model)
    assert torch.equal(got, wanted)
    # Forwards, and again on the way back.
    assert len(sizes) == len(whole) == 2 * LAYERS
    file = (folder / "model.safetensors").stat().st_size / 1024
    assert whole[-1] > 0.9 * file
    assert max(sizes) < 0.5 * file


def test_afterwards_nothing_is_given_back(model):
    with release_mapped_pages(model):
        pass
    step(model)
    assert in_memory(mapped_ranges(model)) > 0
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_weight_that_was_written_keeps_what_was_written(model):
    weight = model.model.layers[1].mlp.up_proj.weight
    weight.data[0] = 7.0
    with release_mapped_pages(model):
        step(model)
    assert (weight[0] == 7.0).all()


@pytest.mark.parametrize("name", ["maps", "smaps"])
def test_on_a_system_without_a_map_of_memory_nothing_is_done(model, monkeypatch, name):
    lines = mapped_weights._lines
    monkeypatch.setattr(
        mapped_weights, "_lines", lambda asked: [] if asked == name else lines(asked)
    )
    wanted, whole = step(model)
    with release_mapped_pages(model):
        got, sizes = step(model)
    assert torch.equal(got, wanted)
    assert min(sizes) == whole[-1]


def test_weights_that_are_not_mapped_are_left_alone(model):
    copied = AutoModelForCausalLM.from_config(model.config)
    assert mapped_ranges(copied) == []
    with release_mapped_pages(copied):
        assert not any(module._forward_pre_hooks for module in copied.modules())
