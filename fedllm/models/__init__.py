"""Models: the frozen base."""

from fedllm.models.loading import load_base, load_tokenizer, locate

__all__ = ["load_base", "load_tokenizer", "locate"]
