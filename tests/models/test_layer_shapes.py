"""Shapes from config.json alone are those of the model itself."""

import json
from pathlib import Path

import pytest
from transformers import LlamaConfig, Qwen3Config

from fedllm.adapters.linear_layers import linear_layers
from fedllm.errors import ModelError
from fedllm.models.known import BUILT_IN_MODEL, KNOWN_MODELS
from fedllm.models.layer_shapes import linear_shapes


@pytest.mark.parametrize("name", KNOWN_MODELS)
def test_known_models_have_the_shapes_that_transformers_makes(name):
    config = LlamaConfig(**KNOWN_MODELS[name].numbers)
    shapes, heads = linear_layers(config)

    assert linear_shapes(name) == {k: v for k, v in shapes.items() if k not in heads}


def test_the_known_numbers_are_those_of_the_fetched_model():
    folder = Path("~/.fedllm/models").expanduser() / BUILT_IN_MODEL.name
    if not (folder / "config.json").exists():
        pytest.skip("the built-in model has not been fetched")

    assert linear_shapes(str(folder)) == linear_shapes(BUILT_IN_MODEL.name)
    written = json.loads((folder / "config.json").read_text())
    assert BUILT_IN_MODEL.numbers.items() <= written.items()


def test_a_local_folder_with_heads_of_their_own_size(tmp_path):
    config = Qwen3Config(
        vocab_size=8,
        hidden_size=32,
        intermediate_size=48,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_hidden_layers=2,
    )
    config.save_pretrained(tmp_path)
    shapes, heads = linear_layers(config)

    got = linear_shapes(str(tmp_path))

    assert got == {k: v for k, v in shapes.items() if k not in heads}
    assert got["model.layers.0.self_attn.q_proj"] == (64, 32)


def test_an_unknown_model_raises_an_error_with_a_remedy(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))

    for name in (str(tmp_path), "someone/some-model"):
        with pytest.raises(ModelError, match="--trainable"):
            linear_shapes(name)
