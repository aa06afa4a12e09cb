"""Limits that a base model puts on examples: positions, and rows of its embedding."""

from typing import Any

from fedllm.errors import ConfigError


def vocabulary_of(model_config: Any) -> int | None:
    """Return how many tokens a model knows; None if its configuration states no number.

    Args:
        model_config: A `PretrainedConfig`.
    """
    size = getattr(_text_config(model_config), "vocab_size", None)
    return size if isinstance(size, int) else None


def require_positions(max_length: int, model_config: Any) -> None:
    """Check that the model has a position for each token of the longest example.

    Args:
        max_length: `train.max-length`.
        model_config: A `PretrainedConfig`.

    Raises:
        ConfigError: It has not.
    """
    positions = getattr(_text_config(model_config), "max_position_embeddings", None)
    if isinstance(positions, int) and 0 < positions < max_length:
        raise ConfigError(
            f"train.max-length: must be at most {positions}, the positions of the base "
            f"model (got {max_length})"
        )


def _text_config(model_config: Any) -> Any:
    """Return the part about text of a configuration that has other parts too."""
    part = getattr(model_config, "get_text_config", None)
    return part() if callable(part) else model_config
