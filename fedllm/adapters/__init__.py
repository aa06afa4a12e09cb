"""Adapters: what is trained and travels."""

from fedllm.adapters.peft_model import (
    attach,
    get_trained,
    initial_arrays,
    set_trained,
)
from fedllm.adapters.resolve import adapter_spec

__all__ = ["adapter_spec", "attach", "get_trained", "initial_arrays", "set_trained"]
