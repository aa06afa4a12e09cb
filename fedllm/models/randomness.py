"""What a base model would draw at random, or remember of other rows, while it trains."""

import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from fedllm.errors import ConfigError

if TYPE_CHECKING:
    import torch

# dropout, attn_pdrop, layerdrop, drop_path_rate, router_jitter_noise, ...
_RANDOM = re.compile(r"drop|jitter")
# Heads of other tasks, which a causal language model does not have.
_OTHER_HEADS = re.compile(r"^(classifier|summary)_")


def require_no_randomness(model: "torch.nn.Module") -> None:
    """Check that a row's gradient is a function of the row: no dropout, no memory.

    Random masks are drawn for a whole batch in turn, so one row more would change those of
    all rows after it.

    Args:
        model: The base model, with or without an adapter.

    Raises:
        ConfigError: It has dropout or routing noise, or a rotary embedding that keeps the
            longest length it has seen.
    """
    config: Any = getattr(model, "config", None)
    settings = config.to_dict() if hasattr(config, "to_dict") else {}
    found = sorted({*_random_settings(settings), *_random_modules(model)})
    if found:
        raise ConfigError(
            f"model.name: the base model has {', '.join(found)}; set each to 0.0 in its "
            "config.json: under privacy.unit='record' one record's random mask would "
            "change those of the others"
        )
    if "dynamic" in _rope_types(settings):
        raise ConfigError(
            "model.name: the base model's rotary embedding is 'dynamic', which keeps the "
            "longest length seen: under privacy.unit='record' one record would change the "
            "gradients of the others; take another rope_type in its config.json"
        )


def _random_settings(settings: Mapping[str, Any]) -> Iterator[str]:
    """Yield the settings of a configuration that ask for randomness."""
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from _random_settings(value)
        elif _is_random(name, value) and not _OTHER_HEADS.match(name):
            yield f"{name}={value}"


def _random_modules(model: "torch.nn.Module") -> Iterator[str]:
    """Yield what modules hold of it: some pass a number to a function at each call."""
    import torch

    for module in model.modules():
        if isinstance(module, torch.nn.modules.dropout._DropoutNd) and module.p > 0:
            yield f"{type(module).__name__}({module.p})"
        for name, value in vars(module).items():
            if _is_random(name, value):
                yield f"{name}={value}"


def _is_random(name: str, value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return value > 0 and _RANDOM.search(name) is not None


def _rope_types(settings: Mapping[str, Any]) -> Iterator[object]:
    """Yield the kinds of rotary embedding that a configuration names."""
    for name, value in settings.items():
        if name in ("rope_type", "type"):
            yield value
        elif isinstance(value, Mapping):
            yield from _rope_types(value)
