"""The layers that an adapter may sit on, of every kind of architecture."""

import pytest

from fedllm.adapters.linear_layers import linear_layers, linear_shape
from fedllm.adapters.peft_model import attach
from fedllm.adapters.resolve import adapter_spec
from fedllm.config import AdapterConfig
from fedllm.errors import AdapterError
from tests.helpers.architectures import ARCHITECTURES

MODELS = {architecture.name: architecture for architecture in ARCHITECTURES}


def spec_of(name, **more):
    return adapter_spec(AdapterConfig(rank=2, **more), MODELS[name].config(), 0)


def adapted(name, **more):
    """Return the modules that PEFT really adapts."""
    model = attach(MODELS[name].model(), spec_of(name, **more))
    end = ".lora_A.default"
    start = "base_model.model."
    return {
        n.removeprefix(start).removesuffix(end)
        for n, _ in model.named_modules()
        if n.endswith(end)
    }


def test_a_layer_that_lies_the_other_way_round_is_linear():
    shapes, excluded = linear_layers(MODELS["GPT-2"].config())

    assert shapes["transformer.h.0.attn.c_attn"] == (96, 32)
    assert list(excluded) == ["lm_head"]
    assert linear_shape(MODELS["GPT-2"].model().transformer.ln_f) is None


@pytest.mark.parametrize("targets", ["auto", "all-linear"])
def test_no_layer_of_a_vision_tower_is_adapted(targets):
    modules = adapted("Gemma 3, vision", target_modules=targets)

    assert modules == set(spec_of("Gemma 3, vision", target_modules=targets).modules)
    assert modules and all("language_model" in module for module in modules)


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda a: a.name)
def test_peft_adapts_all_linear_layers_that_are_declared_and_no_other(architecture):
    name = architecture.name

    assert adapted(name, target_modules="all-linear") == set(
        spec_of(name, target_modules="all-linear").modules
    )


@pytest.mark.parametrize(
    ("name", "target", "reason"),
    [
        ("Gemma 3, vision", "fc1", "is not of the language model"),
        ("DeepSeek V3", "gate_proj", "PEFT takes for the experts"),
        ("Mamba", "dt_proj", "reads past an adapter"),
        ("Falcon-H1", "out_proj", "reads past an adapter"),
        ("GPT-2", "lm_head", "is the output head"),
    ],
)
def test_a_layer_that_cannot_be_adapted_is_one_line(name, target, reason):
    with pytest.raises(AdapterError, match=f"target-modules: {target} .*{reason}"):
        spec_of(name, target_modules=f"{target}")
