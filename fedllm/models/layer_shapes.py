"""Linear layers of a base model from the numbers in its config.json, without torch."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedllm.errors import ModelError

Shapes = dict[str, tuple[int, int]]

KNOWN: Mapping[str, Mapping[str, Any]] = {
    "smollm2-135m-instruct": {
        "model_type": "llama",
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "num_hidden_layers": 30,
    },
    "openlm-research/open_llama_3b_v2": {
        "model_type": "llama",
        "hidden_size": 3200,
        "intermediate_size": 8640,
        "num_attention_heads": 32,
        "num_hidden_layers": 26,
    },
}
"""Numbers of models that can be planned for without having them (a test compares)."""

# Families whose layers are named and shaped like Llama's.
_LIKE_LLAMA = ("llama", "mistral", "qwen2", "qwen3", "smollm3")


def linear_shapes(name: str) -> Shapes:
    """Return the linear layers of a model, (out, in) by full name, without its head.

    Args:
        name: A model of KNOWN, or a local folder with a config.json.

    Raises:
        ModelError: The model is neither, or of a family whose layers are not known here.
    """
    numbers = KNOWN.get(name)
    if numbers is None:
        path = Path(name).expanduser() / "config.json"
        try:
            numbers = json.loads(path.read_text("utf-8"))
        except (OSError, ValueError):
            raise ModelError(
                f"model.name: {name!r} is no folder with a config.json, and planning "
                "fetches nothing; give the number of trained values by --trainable"
            ) from None
    if numbers.get("model_type") not in _LIKE_LLAMA:
        raise ModelError(
            f"model.name: layers of {numbers.get('model_type')!r} models are not known "
            "to the planner; give the number of trained values by --trainable"
        )
    return _llama_shapes(numbers)


def _llama_shapes(numbers: Mapping[str, Any]) -> Shapes:
    """Return the layers of a model of Llama's kind."""
    hidden, inner = numbers["hidden_size"], numbers["intermediate_size"]
    heads = numbers["num_attention_heads"]
    head = numbers.get("head_dim") or hidden // heads
    queries = heads * head
    keys = (numbers.get("num_key_value_heads") or heads) * head
    layer = {
        "self_attn.q_proj": (queries, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, queries),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    return {
        f"model.layers.{index}.{name}": shape
        for index in range(numbers["num_hidden_layers"])
        for name, shape in layer.items()
    }
