"""VeRA: delta W = diag(lambda_b) @ B @ diag(lambda_d) @ A, with shared random A and B.

Every module takes the first rows of one B and the first columns of one A, which are drawn
from the public seed alone. Both lambdas are trained, so a mean of clients is not the mean
of their updates, and noise in one meets noise in the other, as with `lora`.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from fedllm.adapters.kinds.kind import Shape, Targets
from fedllm.adapters.kinds.lora import queries_and_values
from fedllm.adapters.spec import AdapterSpec, Arrays, generator_of

if TYPE_CHECKING:
    import torch
    from peft import PeftModel, VeraConfig

_FIRST_LAMBDA_D = 0.1
"""PEFT's start, and the paper's (table 6c)."""


class Vera:
    """Two vectors a module are trained, around factors that all modules share."""

    peft_method = "VeRA"
    has_rank = True
    has_dropout = True
    is_mean_exact = False
    why_not_nested = "the mean of its two vectors is not the mean of the updates"
    file_shapes: Mapping[str, Sequence[tuple[str, ...]]] = {
        "vera_lambda_b": [("out",)],
        "vera_lambda_d": [("r",)],
    }

    def default_modules(self, model_type: str) -> Sequence[Targets]:
        """Return the attention's queries and values, as for LoRA."""
        return queries_and_values(model_type)

    def max_rank(self, shapes: Iterable[Shape]) -> int | None:
        """Return None: the factors are random, not a decomposition, so any rank fits."""
        return None

    def trained_tensors(
        self, spec: AdapterSpec, module: str
    ) -> dict[str, tuple[int, ...]]:
        """Return last part of the name -> shape of each trained array of a module."""
        out_features = spec.modules[module][0]
        return {"vera_lambda_b": (out_features,), "vera_lambda_d": (spec.rank,)}

    def initial_arrays(self, spec: AdapterSpec) -> Arrays:
        """Return the trained values of an adapter that leaves the base unchanged."""
        return {
            name: np.full(
                shape, _FIRST_LAMBDA_D if name.endswith("lambda_d") else 0, np.float32
            )
            for name, shape in spec.trained_shapes.items()
        }

    def peft_arrays(
        self, spec: AdapterSpec, trained: Mapping[str, npt.NDArray[Any]]
    ) -> Arrays:
        """Return the lambdas and the shared factors under PEFT's names."""
        a, b = _fixed_factors(spec)
        lambdas = {
            name: np.ascontiguousarray(trained[name], np.float32)
            for name in spec.trained_shapes
        }
        return {"base_model.vera_A": a, "base_model.vera_B": b, **lambdas}

    def trained_arrays(
        self, spec: AdapterSpec, arrays: Mapping[str, npt.NDArray[Any]]
    ) -> Arrays:
        """Return the lambdas, which have the same name in PEFT."""
        return {name: np.asarray(arrays[name]) for name in spec.trained_shapes}

    def peft_config(
        self, spec: AdapterSpec, base_name: str | None = None
    ) -> "VeraConfig":
        """Return PEFT's configuration of this adapter.

        The shared factors are saved: PEFT would draw other ones from its own key.
        """
        from peft import VeraConfig

        return VeraConfig(
            task_type="CAUSAL_LM",
            base_model_name_or_path=base_name,
            r=spec.rank,
            vera_dropout=spec.dropout,
            target_modules=sorted(spec.target_modules),
            save_projection=True,
            bias="none",
        )

    def freeze_factors(self, model: "PeftModel", spec: AdapterSpec) -> None:
        """Write the shared factors into a model; its modules hold references to them."""
        import torch

        a, b = _fixed_factors(spec)
        with torch.no_grad():
            model.base_model.vera_A["default"].copy_(torch.from_numpy(a))
            model.base_model.vera_B["default"].copy_(torch.from_numpy(b))

    def parameter(self, layer: Any, side: str) -> "torch.nn.Parameter":
        """Return the parameter of an adapted layer that travels as `side`."""
        vector: torch.nn.Parameter = getattr(layer, side)["default"]
        return vector


def _fixed_factors(spec: AdapterSpec) -> tuple[Any, Any]:
    """Return A (r, largest in) and B (largest out, r): Kaiming uniform, as PEFT's."""
    rows = max(shape[0] for shape in spec.modules.values())
    columns = max(shape[1] for shape in spec.modules.values())
    factors = []
    for name, shape in (("A", (spec.rank, columns)), ("B", (rows, spec.rank))):
        bound = np.sqrt(6 / shape[1])
        draws = generator_of(spec.seed, "vera." + name).uniform(-bound, bound, shape)
        factors.append(draws.astype(np.float32))
    return factors[0], factors[1]
