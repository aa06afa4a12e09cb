"""LoRA: delta W = alpha/rank * B @ A, with A, both sides or neither fixed."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from fedllm.adapters.spec import PREFIX, AdapterSpec, Arrays, generator_of

if TYPE_CHECKING:
    import torch
    from peft import LoraConfig, PeftModel


def initial_arrays(spec: AdapterSpec) -> Arrays:
    """Return the trained values of an adapter that leaves the base unchanged."""
    arrays: Arrays = {}
    for name, shape in spec.trained_shapes.items():
        if name.endswith("lora_A.weight"):
            # PEFT's own start of A: uniform, Kaiming with a = sqrt(5).
            bound = 1 / np.sqrt(shape[1])
            draws = generator_of(spec.seed, name).uniform(-bound, bound, shape)
            arrays[name] = draws.astype(np.float32)
        else:
            arrays[name] = np.zeros(shape, np.float32)
    return arrays


def peft_arrays(spec: AdapterSpec, trained: Mapping[str, npt.NDArray[Any]]) -> Arrays:
    """Return A and B of every module under PEFT's names; a core is folded into B."""
    arrays: Arrays = {}
    for module, (out_features, in_features) in spec.modules.items():
        name = PREFIX + module
        if spec.kind == "lora":
            a = trained[f"{name}.lora_A.weight"]
            b = trained[f"{name}.lora_B.weight"]
        else:
            a = _fixed_a(spec, module, in_features)
            if spec.kind == "ffa-lora":
                b = trained[f"{name}.lora_B.weight"]
            else:
                left = _fixed_left(spec, module, out_features)
                b = left @ trained[f"{name}.lora_core.weight"]
        arrays[f"{name}.lora_A.weight"] = np.ascontiguousarray(a, np.float32)
        arrays[f"{name}.lora_B.weight"] = np.ascontiguousarray(b, np.float32)
    return arrays


def peft_config(spec: AdapterSpec, base_name: str | None = None) -> "LoraConfig":
    """Make PEFT's configuration of this adapter."""
    from peft import LoraConfig

    return LoraConfig(
        task_type="CAUSAL_LM",
        base_model_name_or_path=base_name,
        r=spec.rank,
        lora_alpha=spec.alpha,
        lora_dropout=spec.dropout,
        target_modules=sorted(spec.target_modules),
        bias="none",
    )


def freeze_factors(model: "PeftModel", spec: AdapterSpec) -> None:
    """Write the fixed factors into a model; a core becomes the parameter of its B."""
    import torch
    from torch.nn.utils import parametrize

    if spec.kind == "lora":
        return
    base = model.get_base_model()
    for module, (out_features, in_features) in spec.modules.items():
        layer = base.get_submodule(module)
        a, b = layer.lora_A["default"], layer.lora_B["default"]
        with torch.no_grad():
            a.weight.copy_(torch.from_numpy(_fixed_a(spec, module, in_features)))
        if spec.kind == "lora-core":
            left = torch.from_numpy(_fixed_left(spec, module, out_features))
            parametrize.register_parametrization(
                b, "weight", _fixed_left_module(left.to(b.weight.device))
            )


def parameter(layer: Any, side: str) -> "torch.nn.Parameter":
    """Return the parameter of a module that travels as `side`."""
    found: torch.nn.Parameter
    if side == "lora_core.weight":
        found = layer.lora_B["default"].parametrizations.weight.original
    else:
        found = getattr(layer, side.removesuffix(".weight"))["default"].weight
    return found


def _orthonormal_columns(seed: int, name: str, rows: int, columns: int) -> Any:
    """Return a (rows, columns) float32 matrix with orthonormal columns."""
    q, r = np.linalg.qr(generator_of(seed, name).standard_normal((rows, columns)))
    # QR is unique up to the signs of R's diagonal, which LAPACKs choose differently.
    return np.ascontiguousarray(q * np.where(np.diag(r) < 0, -1.0, 1.0), np.float32)


def _fixed_a(spec: AdapterSpec, module: str, in_features: int) -> Any:
    """Return the fixed A (r, in): orthonormal rows."""
    columns = _orthonormal_columns(spec.seed, module + ".A", in_features, spec.rank)
    return np.ascontiguousarray(columns.T)


def _fixed_left(spec: AdapterSpec, module: str, out_features: int) -> Any:
    """Return the fixed left factor (out, r) of a core: orthonormal columns."""
    return _orthonormal_columns(spec.seed, module + ".B", out_features, spec.rank)


def _fixed_left_module(left: "torch.Tensor") -> Any:
    """Make the parametrisation weight = left @ core, whose parameter is the core."""
    import torch

    class FixedLeft(torch.nn.Module):
        left: torch.Tensor

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("left", left)

        def forward(self, core: torch.Tensor) -> torch.Tensor:
            return self.left @ core

        def right_inverse(self, weight: torch.Tensor) -> torch.Tensor:
            return self.left.T @ weight

    return FixedLeft()
