"""The tokens that a model can take: those that it has embeddings for."""

from typing import TYPE_CHECKING, Any

from fedllm.errors import ModelError

if TYPE_CHECKING:
    import torch


def num_embeddings(base: Any) -> int:
    """Return how many tokens a model has embeddings for."""
    table = base.get_input_embeddings()
    rows = getattr(table, "num_embeddings", None)
    return int(rows if rows else base.config.get_text_config().vocab_size)


def require_known_tokens(base: Any, input_ids: "torch.Tensor") -> None:
    """Check that a model has an embedding for each token.

    On a GPU a token without one would end the process.

    Raises:
        ModelError: It has none for a token.
    """
    rows = num_embeddings(base)
    if input_ids.numel() and (highest := int(input_ids.max())) >= rows:
        raise ModelError(
            f"a row has token {highest}, and the model has embeddings for {rows} tokens: its "
            "tokenizer has tokens that were added without embeddings; take the model's own "
            "tokenizer, or resize the model's embeddings (resize_token_embeddings) and save "
            "it again"
        )
