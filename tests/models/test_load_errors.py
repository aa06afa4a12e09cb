"""A model that cannot be loaded is one line."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from fedllm.errors import ModelError
from fedllm.models.loading import load_base, load_tokenizer
from fedllm.models.location import load_config


def test_a_hub_out_of_reach_raises_one_line_with_a_remedy() -> None:
    for load in (load_config, load_tokenizer):
        with pytest.raises(
            ModelError, match=r"hub is out of reach.*local folder"
        ) as raised:
            load("someone/no-such-model-here")
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("config.json", "{"),
        ("config.json", '{"model_type": "no-such-type"}'),
        ("config.json", '{"model_type": "vit"}'),
        ("config.json", '{"auto_map": {"AutoConfig": "own.C"}, "model_type": "own"}'),
        (
            "config.json",
            '{"model_type": "llama", "quantization_config": {"quant_method": "gptq"}}',
        ),
    ],
)
def test_a_configuration_that_cannot_be_used_is_one_line(
    own_llama: Path, file: str, text: str
) -> None:
    (own_llama / file).write_text(text)

    with pytest.raises(ModelError) as raised:
        load_config(str(own_llama))

    assert str(own_llama) in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("quantization", [0, 4])
def test_damaged_weights_are_one_line(
    own_llama: Path, tmp_path: Path, quantization: int
) -> None:
    weights = own_llama / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])

    with pytest.raises(ModelError, match="cannot be loaded") as raised:
        load_base(str(own_llama), quantization, tmp_path, "cpu")

    assert "\n" not in str(raised.value)


def test_a_model_too_large_for_the_memory_is_one_line(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def from_pretrained(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", from_pretrained)

    with pytest.raises(ModelError, match="does not fit into memory"):
        load_base(str(tiny_llama), 0, tmp_path, "cpu")
