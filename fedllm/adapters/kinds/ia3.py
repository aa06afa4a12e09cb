"""IA3: a factor for each output of a module, or for each input of a feed-forward one.

What is trained and travels is the change: factor = 1 + change. It starts at zero like the
other kinds, so weight decay pulls to the base model and small steps are not rounded away
beside the one. A module's update is diag(change) @ W, which is linear in the change.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from fedllm.adapters.spec import PREFIX, AdapterSpec, Arrays

if TYPE_CHECKING:
    import torch
    from peft import IA3Config, PeftModel


def default_modules(model_type: str) -> tuple[list[str], list[str]]:
    """Return PEFT's (target modules, feed-forward ones) for a model's architecture.

    An architecture that PEFT does not list has Llama's; names that it lacks are refused
    where the adapter is resolved.
    """
    from peft.utils.constants import (
        TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING as FEEDFORWARD,
    )
    from peft.utils.constants import (
        TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING as TARGETS,
    )

    known = model_type if model_type in FEEDFORWARD else "llama"
    return list(TARGETS[known]), list(FEEDFORWARD[known])


def initial_arrays(spec: AdapterSpec) -> Arrays:
    """Return the trained values of an adapter that leaves the base unchanged."""
    return {n: np.zeros(s, np.float32) for n, s in spec.trained_shapes.items()}


def peft_arrays(spec: AdapterSpec, trained: Mapping[str, npt.NDArray[Any]]) -> Arrays:
    """Return the factors of every module, in PEFT's shape under PEFT's names."""
    arrays: Arrays = {}
    for module in spec.modules:
        factor = 1 + np.asarray(trained[f"{PREFIX}{module}.ia3_change"], np.float32)
        shape = (1, -1) if spec.rescales_input(module) else (-1, 1)
        arrays[f"{PREFIX}{module}.ia3_l"] = factor.reshape(shape)
    return arrays


def peft_config(spec: AdapterSpec, base_name: str | None = None) -> "IA3Config":
    """Make PEFT's configuration of this adapter."""
    from peft import IA3Config

    return IA3Config(
        task_type="CAUSAL_LM",
        base_model_name_or_path=base_name,
        target_modules=sorted(spec.target_modules),
        feedforward_modules=sorted(spec.feedforward),
    )


def freeze_factors(model: "PeftModel", spec: AdapterSpec) -> None:
    """Make the change, not the factor, the parameter of each module."""
    from torch.nn.utils import parametrize

    base = model.get_base_model()
    for module in spec.modules:
        factors = base.get_submodule(module).ia3_l
        shape = (1, -1) if spec.rescales_input(module) else (-1, 1)
        parametrize.register_parametrization(factors, "default", _about_one(shape))
    match_input_dtype(model)


def parameter(layer: Any, side: str) -> "torch.nn.Parameter":
    """Return the parameter of a module that travels as `side`."""
    found: torch.nn.Parameter = layer.ia3_l.parametrizations.default.original
    return found


def match_input_dtype(model: "PeftModel") -> None:
    """Let PEFT's layers answer in the type that they are asked in.

    Over a bitsandbytes layer PEFT 0.21 answers in float32; attention then refuses keys
    and values of another type than the queries.
    """
    from peft.tuners.ia3 import IA3Layer

    for layer in model.modules():
        if isinstance(layer, IA3Layer):
            layer.register_forward_hook(_in_type_of_input)


def _in_type_of_input(layer: Any, args: tuple[Any, ...], output: Any) -> Any:
    return output.to(args[0].dtype)


def _about_one(shape: tuple[int, int]) -> Any:
    """Make the parametrisation factor = 1 + change, whose parameter is the change."""
    import torch

    class AboutOne(torch.nn.Module):
        def forward(self, change: torch.Tensor) -> torch.Tensor:
            return 1 + change.reshape(shape)

        def right_inverse(self, factor: torch.Tensor) -> torch.Tensor:
            return factor.flatten() - 1

    return AboutOne()
