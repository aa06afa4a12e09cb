"""IA3: a factor for each output of a module, or for each input of a feed-forward one.

What is trained and travels is the change: factor = 1 + change. It starts at zero like the
other kinds, so weight decay pulls to the base model and small steps are not rounded away
beside the one. A module's update is diag(change) @ W, which is linear in the change.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from fedllm.adapters.kinds.kind import Shape, Targets
from fedllm.adapters.spec import PREFIX, AdapterSpec, Arrays

if TYPE_CHECKING:
    import torch
    from peft import IA3Config, PeftModel

_LLAMA_MODULES: Targets = (["k_proj", "v_proj", "down_proj"], ["down_proj"])
"""PEFT's choice for Llama, which a planner without torch needs (a test compares)."""

_OTHER_MODULES: Sequence[Targets] = (
    _LLAMA_MODULES,
    (["k_proj", "v_proj", "c_proj"], ["c_proj"]),
    (["query_key_value", "dense_4h_to_h"], ["dense_4h_to_h"]),
    (["qkv_proj", "down_proj"], ["down_proj"]),
    (["c_attn", "mlp.c_proj"], ["mlp.c_proj"]),
    (["Wqkv", "down_proj"], ["down_proj"]),
    # Mixtures of experts, whose feed-forward part is no linear layer.
    (["k_proj", "v_proj"], []),
    (["kv_b_proj"], []),
    (["in_proj"], []),
)


class IA3:
    """One factor a feature is trained; there is no rank and no dropout."""

    peft_method = "IA3"
    has_rank = False
    has_dropout = False
    is_mean_exact = True
    why_not_nested = "it has no rank"
    file_shapes: Mapping[str, Sequence[tuple[str, ...]]] = {
        "ia3_l": [("out", "1"), ("1", "in")]
    }

    def default_modules(self, model_type: str) -> Sequence[Targets]:
        """Return PEFT's (target modules, feed-forward ones) for an architecture, then others.

        If its layers have none of these names, resolving the adapter raises an error that
        lists those that it has.
        """
        if model_type == "llama":
            return [_LLAMA_MODULES]
        from peft.utils import constants

        targets = constants.TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING
        inward = constants.TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING
        if model_type not in inward:
            return _OTHER_MODULES
        return [(list(targets[model_type]), list(inward[model_type])), *_OTHER_MODULES]

    def max_rank(self, shapes: Iterable[Shape]) -> int | None:
        """Return None: there is no rank to check."""
        return None

    def trained_tensors(
        self, spec: AdapterSpec, module: str
    ) -> dict[str, tuple[int, ...]]:
        """Return last part of the name -> shape of each trained array of a module."""
        out_features, in_features = spec.modules[module]
        inward = spec.rescales_input(module)
        return {"ia3_change": (in_features if inward else out_features,)}

    def initial_arrays(self, spec: AdapterSpec) -> Arrays:
        """Return the trained values of an adapter that leaves the base unchanged."""
        return {n: np.zeros(s, np.float32) for n, s in spec.trained_shapes.items()}

    def peft_arrays(
        self, spec: AdapterSpec, trained: Mapping[str, npt.NDArray[Any]]
    ) -> Arrays:
        """Return the factors of every module, in PEFT's shape under PEFT's names."""
        arrays: Arrays = {}
        for module in spec.modules:
            change = np.asarray(trained[f"{PREFIX}{module}.ia3_change"], np.float32)
            shape = _factor_shape(spec, module)
            arrays[f"{PREFIX}{module}.ia3_l"] = (1 + change).reshape(shape)
        return arrays

    def trained_arrays(
        self, spec: AdapterSpec, arrays: Mapping[str, npt.NDArray[Any]]
    ) -> Arrays:
        """Return how far every module's factors are from one."""
        return {
            f"{PREFIX}{module}.ia3_change": (
                np.asarray(arrays[f"{PREFIX}{module}.ia3_l"]).flatten() - 1
            )
            for module in spec.modules
        }

    def peft_config(
        self, spec: AdapterSpec, base_name: str | None = None
    ) -> "IA3Config":
        """Return PEFT's configuration of this adapter."""
        from peft import IA3Config

        return IA3Config(
            task_type="CAUSAL_LM",
            base_model_name_or_path=base_name,
            target_modules=sorted(spec.target_modules),
            feedforward_modules=sorted(spec.feedforward),
        )

    def freeze_factors(self, model: "PeftModel", spec: AdapterSpec) -> None:
        """Make the change, not the factor, the parameter of each module."""
        from torch.nn.utils import parametrize

        base = model.get_base_model()
        for module in spec.modules:
            factors = base.get_submodule(module).ia3_l
            about_one = _about_one(_factor_shape(spec, module))
            parametrize.register_parametrization(factors, "default", about_one)
        match_input_dtype(model)

    def parameter(self, layer: Any, side: str) -> "torch.nn.Parameter":
        """Return the change of an adapted layer."""
        change: torch.nn.Parameter = layer.ia3_l.parametrizations.default.original
        return change


def match_input_dtype(model: "PeftModel") -> None:
    """Make PEFT's IA3 layers return the type of their input.

    Over a bitsandbytes layer PEFT 0.21 returns float32; attention then rejects keys and
    values of another type than the queries.
    """
    from peft.tuners.ia3 import IA3Layer

    for layer in model.modules():
        if isinstance(layer, IA3Layer):
            layer.register_forward_hook(_in_type_of_input)


def _in_type_of_input(layer: Any, args: tuple[Any, ...], output: Any) -> Any:
    return output.to(args[0].dtype)


def _factor_shape(spec: AdapterSpec, module: str) -> tuple[int, int]:
    """Return the shape of a module's factors in PEFT: a row over inputs, else a column."""
    return (1, -1) if spec.rescales_input(module) else (-1, 1)


def _about_one(shape: tuple[int, int]) -> Any:
    """Return the parametrisation factor = 1 + change, whose parameter is the change."""
    import torch

    class AboutOne(torch.nn.Module):
        def forward(self, change: torch.Tensor) -> torch.Tensor:
            return 1 + change.reshape(shape)

        def right_inverse(self, factor: torch.Tensor) -> torch.Tensor:
            return factor.flatten() - 1

    return AboutOne()
