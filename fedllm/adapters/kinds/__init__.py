"""Kinds of adapter, one module a family: all that is asked of a kind is asked here.

| kind | trained | fixed, from the public seed | values a module | mean is exact |
|---|---|---|---|---|
| `ffa-lora` | B (out x r) | A (r x in), orthonormal | out * r | yes |
| `lora-core` | core (r x r), B = left @ core | left (out x r), A, orthonormal | r * r | yes |
| `lora` | A and B | - | (in + out) * r | no |
| `ia3` | factors of the outputs, or of the inputs | - | out, or in | yes |
| `vera` | lambda_b (out), lambda_d (r) | A, B, shared by all modules | out + r | no |

A new kind is a module with a class that fulfils `kind.Kind`, a row above, a line in `KINDS`
and its name in `fedllm.config.AdapterKind`; tests/adapters/kinds/test_contract.py walks all
of them. Nothing here needs torch until a model is at hand. Sources: LoRA, Hu et al. 2021
(arXiv 2106.09685); FFA-LoRA, Sun et al. 2024 (arXiv 2403.12313); LoRA-XS, Balazy et al. 2024
(arXiv 2405.17604), which takes singular vectors where we take random orthonormal ones; IA3,
Liu et al. 2022 (arXiv 2205.05638); VeRA, Kopiczko et al. 2023 (arXiv 2310.11454).
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from fedllm.adapters.kinds.ia3 import IA3, match_input_dtype
from fedllm.adapters.kinds.kind import Kind
from fedllm.adapters.kinds.lora import FFALora, Lora, LoraCore
from fedllm.adapters.kinds.vera import Vera
from fedllm.config import AdapterKind

if TYPE_CHECKING:
    from peft import PeftModel

KINDS: Mapping[AdapterKind, Kind] = {
    "ffa-lora": FFALora(),
    "lora-core": LoraCore(),
    "lora": Lora(),
    "ia3": IA3(),
    "vera": Vera(),
}
"""The closed list of kinds that a server may name."""


def kind_of(name: str) -> Kind:
    """Return a kind by its name.

    Raises:
        ValueError: There is no such kind.
    """
    for known, kind in KINDS.items():
        if name == known:
            return kind
    raise ValueError(f"unknown kind of adapter {name!r}")


def mend_layers(model: "PeftModel") -> None:
    """Mend PEFT's layers on a model that PEFT opened, of whatever kind they are."""
    match_input_dtype(model)
