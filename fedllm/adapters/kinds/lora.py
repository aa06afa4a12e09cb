"""LoRA: delta W = alpha/rank * B @ A, with A, both sides or neither fixed."""

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from fedllm.adapters.kinds.kind import Shape, Targets
from fedllm.adapters.spec import PREFIX, AdapterSpec, Arrays, generator_of
from fedllm.models.layer_shapes import LIKE_LLAMA

if TYPE_CHECKING:
    import torch
    from peft import LoraConfig, PeftModel


_QUERIES_AND_VALUES: Sequence[Targets] = (
    (["q_proj", "v_proj"], []),
    # Fused with the keys.
    (["query_key_value"], []),
    (["qkv_proj"], []),
    (["c_attn"], []),
    (["Wqkv"], []),
    # DeepSeek's: queries and values through a narrow state.
    (["q_b_proj", "kv_b_proj"], []),
    (["q_proj", "kv_b_proj"], []),
    # A state space model's only way in.
    (["in_proj"], []),
)


def queries_and_values(model_type: str) -> Sequence[Targets]:
    """Return the names of queries and values: PEFT's for an architecture, then others.

    A planner without torch asks for models like Llama, which need no look into PEFT.
    """
    if model_type in LIKE_LLAMA:
        return _QUERIES_AND_VALUES
    from peft.utils import constants

    table = constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    known = table.get(model_type)
    # For some it has a pattern, which names no module.
    first: Sequence[Targets] = [(known, [])] if isinstance(known, list) else []
    return [*first, *_QUERIES_AND_VALUES]


class Lora:
    """Both factors are trained."""

    peft_method = "LoRA"
    has_rank = True
    has_dropout = True
    is_mean_exact = False
    why_not_nested = "the mean of its two factors is not the mean of the updates"
    file_shapes: Mapping[str, Sequence[tuple[str, ...]]] = {
        "lora_A": [("r", "in")],
        "lora_B": [("out", "r")],
    }

    def default_modules(self, model_type: str) -> Sequence[Targets]:
        """Return the attention's queries and values, the paper's choice."""
        return queries_and_values(model_type)

    def max_rank(self, shapes: Iterable[Shape]) -> int | None:
        """Return the smallest side: a product of rank r is no more than that."""
        return min(min(shape) for shape in shapes)

    def trained_tensors(
        self, spec: AdapterSpec, module: str
    ) -> dict[str, tuple[int, ...]]:
        """Return last part of the name -> shape of each trained array of a module."""
        out_features, in_features = spec.modules[module]
        return {
            "lora_A.weight": (spec.rank, in_features),
            "lora_B.weight": (out_features, spec.rank),
        }

    def initial_arrays(self, spec: AdapterSpec) -> Arrays:
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

    def peft_arrays(
        self, spec: AdapterSpec, trained: Mapping[str, npt.NDArray[Any]]
    ) -> Arrays:
        """Return A and B of every module under PEFT's names."""
        arrays: Arrays = {}
        for module in spec.modules:
            a, b = self._factors(spec, module, trained)
            for side, factor in (("lora_A", a), ("lora_B", b)):
                name = f"{PREFIX}{module}.{side}.weight"
                arrays[name] = np.ascontiguousarray(factor, np.float32)
        return arrays

    def trained_arrays(
        self, spec: AdapterSpec, arrays: Mapping[str, npt.NDArray[Any]]
    ) -> Arrays:
        """Return the factors that are trained, which have the same name in PEFT."""
        return {name: np.asarray(arrays[name]) for name in spec.trained_shapes}

    def peft_config(
        self, spec: AdapterSpec, base_name: str | None = None
    ) -> "LoraConfig":
        """Return PEFT's configuration of this adapter."""
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

    def freeze_factors(self, model: "PeftModel", spec: AdapterSpec) -> None:
        """Leave the model as it is: no factor is fixed."""

    def parameter(self, layer: Any, side: str) -> "torch.nn.Parameter":
        """Return the parameter of an adapted layer that travels as `side`."""
        factor = getattr(layer, side.removesuffix(".weight"))["default"]
        return _trained_of(factor)

    def _factors(
        self, spec: AdapterSpec, module: str, trained: Mapping[str, npt.NDArray[Any]]
    ) -> tuple[Any, Any]:
        """Return A (r, in) and B (out, r) of a module."""
        name = PREFIX + module
        return trained[f"{name}.lora_A.weight"], trained[f"{name}.lora_B.weight"]


class FFALora(Lora):
    """B is trained, A is fixed."""

    is_mean_exact = True
    why_not_nested = ""

    def trained_tensors(
        self, spec: AdapterSpec, module: str
    ) -> dict[str, tuple[int, ...]]:
        """Return last part of the name -> shape of each trained array of a module."""
        return {"lora_B.weight": (spec.modules[module][0], spec.rank)}

    def freeze_factors(self, model: "PeftModel", spec: AdapterSpec) -> None:
        """Write the fixed A of every module into a model."""
        import torch

        base = model.get_base_model()
        with torch.no_grad():
            for module in spec.modules:
                a = base.get_submodule(module).lora_A["default"]
                a.weight.copy_(torch.from_numpy(_fixed_a(spec, module)))

    def _factors(
        self, spec: AdapterSpec, module: str, trained: Mapping[str, npt.NDArray[Any]]
    ) -> tuple[Any, Any]:
        b = trained[f"{PREFIX}{module}.lora_B.weight"]
        return _fixed_a(spec, module), b


class LoraCore(FFALora):
    """A core between two fixed factors is trained; PEFT sees it folded into B."""

    why_not_nested = "its core of rank x rank values is small on any node"

    def trained_tensors(
        self, spec: AdapterSpec, module: str
    ) -> dict[str, tuple[int, ...]]:
        """Return last part of the name -> shape of each trained array of a module."""
        return {"lora_core.weight": (spec.rank, spec.rank)}

    def trained_arrays(
        self, spec: AdapterSpec, arrays: Mapping[str, npt.NDArray[Any]]
    ) -> Arrays:
        """Return the cores of the factors B: what the fixed left factor sees of them."""
        cores: Arrays = {}
        for module in spec.modules:
            b = np.asarray(arrays[f"{PREFIX}{module}.lora_B.weight"])
            core = _fixed_left(spec, module).T @ b
            cores[f"{PREFIX}{module}.lora_core.weight"] = core
        return cores

    def freeze_factors(self, model: "PeftModel", spec: AdapterSpec) -> None:
        """Write the fixed factors into a model; the core becomes the parameter of B."""
        import torch
        from torch.nn.utils import parametrize

        super().freeze_factors(model, spec)
        base = model.get_base_model()
        for module in spec.modules:
            b = base.get_submodule(module).lora_B["default"]
            left = torch.from_numpy(_fixed_left(spec, module)).to(b.weight.device)
            parametrize.register_parametrization(b, "weight", _fixed_left_module(left))

    def parameter(self, layer: Any, side: str) -> "torch.nn.Parameter":
        """Return the core of an adapted layer."""
        return _trained_of(layer.lora_B["default"])

    def _factors(
        self, spec: AdapterSpec, module: str, trained: Mapping[str, npt.NDArray[Any]]
    ) -> tuple[Any, Any]:
        core = trained[f"{PREFIX}{module}.lora_core.weight"]
        return _fixed_a(spec, module), _fixed_left(spec, module) @ core


def _trained_of(factor: Any) -> "torch.nn.Parameter":
    """Return what is trained of a factor: its weight, or what the weight is made of."""
    chain = getattr(factor, "parametrizations", None)
    weight: torch.nn.Parameter
    weight = factor.weight if chain is None else chain.weight.original
    return weight


def _orthonormal_columns(seed: int, name: str, rows: int, columns: int) -> Any:
    """Return a (rows, columns) float32 matrix with orthonormal columns."""
    q, r = np.linalg.qr(generator_of(seed, name).standard_normal((rows, columns)))
    # QR is unique up to the signs of R's diagonal, which LAPACKs choose differently.
    return np.ascontiguousarray(q * np.where(np.diag(r) < 0, -1.0, 1.0), np.float32)


def _fixed_a(spec: AdapterSpec, module: str) -> Any:
    """Return the fixed A (r, in) of a module: orthonormal rows."""
    in_features = spec.modules[module][1]
    columns = _orthonormal_columns(spec.seed, module + ".A", in_features, spec.rank)
    return np.ascontiguousarray(columns.T)


def _fixed_left(spec: AdapterSpec, module: str) -> Any:
    """Return the fixed left factor (out, r) of a core: orthonormal columns."""
    out_features = spec.modules[module][0]
    return _orthonormal_columns(spec.seed, module + ".B", out_features, spec.rank)


def _fixed_left_module(left: "torch.Tensor") -> Any:
    """Return the parametrisation weight = left @ core, whose parameter is the core."""
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
