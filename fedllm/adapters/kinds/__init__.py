"""Kinds of adapter, one module a family; `fedllm.adapters.peft_model` chooses between them.

| kind | trained | fixed, from the public seed | values a module | mean is exact |
|---|---|---|---|---|
| `ffa-lora` | B (out x r) | A (r x in), orthonormal | out * r | yes |
| `lora-core` | core (r x r), B = left @ core | left (out x r), A, orthonormal | r * r | yes |
| `lora` | A and B | - | (in + out) * r | no |
| `ia3` | factors of the outputs, or of the inputs | - | out, or in | yes |
| `vera` | lambda_b (out), lambda_d (r) | A, B, shared by all modules | out + r | no |

A family is a module with the same five functions: `initial_arrays`, `peft_arrays`,
`peft_config`, `freeze_factors` and `parameter`. What a kind declares is in `spec.py`, which needs no
torch. Sources: LoRA, Hu et al. 2021 (arXiv 2106.09685); FFA-LoRA, Sun et al. 2024 (arXiv
2403.12313); LoRA-XS, Balazy et al. 2024 (arXiv 2405.17604), which takes singular vectors
where we take random orthonormal ones; IA3, Liu et al. 2022 (arXiv 2205.05638); VeRA,
Kopiczko et al. 2023 (arXiv 2310.11454).
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

import numpy.typing as npt

from fedllm.adapters.kinds import ia3, lora, vera
from fedllm.adapters.spec import AdapterSpec, Arrays
from fedllm.config import AdapterKind

if TYPE_CHECKING:
    import torch
    from peft import PeftConfig, PeftModel

KINDS: tuple[AdapterKind, ...] = ("ffa-lora", "lora-core", "lora", "ia3", "vera")
"""The closed list of kinds that a server may name."""


class Family(Protocol):
    """What a module of `fedllm.adapters.kinds` has."""

    def initial_arrays(self, spec: AdapterSpec) -> Arrays: ...

    def peft_arrays(
        self, spec: AdapterSpec, trained: Mapping[str, npt.NDArray[Any]]
    ) -> Arrays: ...

    def peft_config(
        self, spec: AdapterSpec, base_name: str | None = None
    ) -> "PeftConfig": ...

    def freeze_factors(self, model: "PeftModel", spec: AdapterSpec) -> None: ...

    def parameter(self, layer: Any, side: str) -> "torch.nn.Parameter": ...


def family_of(kind: str) -> Family:
    """Return the module that knows a kind."""
    match kind:
        case "ia3":
            return ia3
        case "vera":
            return vera
        case _:
            return lora
