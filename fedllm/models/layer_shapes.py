"""Linear layers of a base model from the numbers in its config.json, without torch."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedllm.errors import ModelError
from fedllm.models.known import KNOWN_MODELS

Shapes = dict[str, tuple[int, int]]

# Families whose layers are named and shaped like Llama's.
LIKE_LLAMA = ("llama", "mistral", "qwen2", "qwen3", "smollm3")

_STATE_SPACE_NAMES = ("x_proj", "dt_proj", "out_proj")


def is_read_past(parent: Any, name: str) -> bool:
    """Return whether a layer's weight is read by its parent, past what stands for the layer.

    So it is in state space layers, by transformers' code or by the kernels on a GPU.

    Args:
        parent: The module that holds the layer.
        name: The layer's name in it.
    """
    return name in _STATE_SPACE_NAMES and hasattr(parent, "A_log")


def linear_shapes(name: str) -> Shapes:
    """Return the linear layers of a model, (out, in) by full name, without its head.

    Args:
        name: A model of KNOWN_MODELS, or a local folder with a config.json.

    Raises:
        ModelError: The model is neither, or its family's layers are not known here.
    """
    known = KNOWN_MODELS.get(name)
    if known is not None:
        numbers = known.numbers
    else:
        path = Path(name).expanduser() / "config.json"
        try:
            numbers = json.loads(path.read_text("utf-8"))
        except (OSError, ValueError):
            raise ModelError(
                f"model.name: {name!r} is no folder with a config.json, and planning "
                "fetches nothing; give the number of trained values by --trainable"
            ) from None
    if numbers.get("model_type") not in LIKE_LLAMA:
        raise ModelError(
            f"model.name: layers of {numbers.get('model_type')!r} models are not known "
            "to the planner; give the number of trained values by --trainable"
        )
    return _llama_shapes(numbers)


def _llama_shapes(numbers: Mapping[str, Any]) -> Shapes:
    """Return the linear layers of a model like Llama."""
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
