"""A training step of the user's own: a trainer callback or a collator from an installed package.

`train.plugin = "module:function"` names a function without arguments. What it returns is a
callback of transformers' trainer, called beside our own, or a collator, which makes a batch of
rows with `input_ids` and `labels`.
"""

import importlib
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from importlib.metadata import packages_distributions
from typing import Any

from transformers.trainer_callback import TrainerCallback

from fedllm.errors import ConfigError

Collator = Callable[[Sequence[Mapping[str, Any]]], dict[str, Any]]


def load_plugin(name: str) -> TrainerCallback | Collator:
    """Return what the function that `train.plugin` names makes.

    Args:
        name: `module:function`.

    Raises:
        ConfigError: The module is of no installed package, it or the function is missing,
            or what the function returns is neither a callback nor a collator.
    """
    module_name, _, function_name = name.partition(":")
    package = module_name.partition(".")[0]
    # A module of the standard library, or one that came with a delivered app, is in none.
    if package == "fedllm" or package not in _packages():
        raise ConfigError(
            f"train.plugin: {package!r} is no package that is installed here, apart from "
            "fedllm itself: install it on every node (got "
            f"{name!r})"
        )
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"train.plugin: {name!r}: {error}") from error
    made = function()
    if isinstance(made, TrainerCallback) or callable(made):
        return made
    raise ConfigError(
        f"train.plugin: {name!r} returns a {type(made).__name__}, which is neither a "
        "TrainerCallback nor a collator"
    )


@lru_cache(maxsize=1)
def _packages() -> frozenset[str]:
    return frozenset(packages_distributions())
