"""Kinds of adapter: what is trained, what is fixed, and PEFT's form of both.

Every kind is a LoRA, delta W = alpha/rank * B @ A, for each target module:

| kind | trained | fixed, orthonormal | values a module | mean is exact |
|---|---|---|---|---|
| `ffa-lora` | B (out x r) | A (r x in) | out * r | yes |
| `lora-core` | core (r x r), B = left @ core | left (out x r), A | r * r | yes |
| `lora` | A and B | - | (in + out) * r | no |

Fixed factors come from the public seed and the module's name, so they never travel and
every process makes the same ones. Sources: FFA-LoRA, Sun et al. 2024
(arXiv 2403.12313); LoRA-XS, Balazy et al. 2024 (arXiv 2405.17604), which takes singular
vectors where we take random orthonormal ones.
"""

import contextlib
import warnings
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from fedllm.config import AdapterConfig
from fedllm.errors import AdapterError

if TYPE_CHECKING:
    import torch
    from peft import LoraConfig, PeftModel
    from transformers import PretrainedConfig, PreTrainedModel

Arrays = dict[str, npt.NDArray[np.float32]]

PREFIX = "base_model.model."
"""What PEFT puts before a module's name."""


@dataclass(frozen=True)
class AdapterSpec:
    """One adapter, fully resolved for one base model.

    Attributes:
        kind: `ffa-lora`, `lora-core` or `lora`.
        rank: Rank r.
        alpha: The update is scaled by alpha / rank.
        dropout: Dropout on the adapter's input while training.
        target_modules: The adapted modules as PEFT is told: last parts of their names
            where those mean no other module, else whole names.
        modules: Full module name -> (out features, in features), sorted by name.
        seed: Public seed of the fixed factors and of the first A of `lora`.
    """

    kind: str
    rank: int
    alpha: float
    dropout: float
    target_modules: tuple[str, ...]
    modules: Mapping[str, tuple[int, int]]
    seed: int

    @property
    def trained_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of every array that is trained and travels."""
        shapes: dict[str, tuple[int, ...]] = {}
        for module, (out_features, in_features) in self.modules.items():
            name = PREFIX + module
            if self.kind == "lora-core":
                shapes[f"{name}.lora_core.weight"] = (self.rank, self.rank)
                continue
            if self.kind == "lora":
                shapes[f"{name}.lora_A.weight"] = (self.rank, in_features)
            shapes[f"{name}.lora_B.weight"] = (out_features, self.rank)
        return shapes

    @property
    def num_trainable(self) -> int:
        """Number d of trained values."""
        return sum(int(np.prod(shape)) for shape in self.trained_shapes.values())


def adapter_spec(
    config: AdapterConfig, model_config: "PretrainedConfig", seed: int
) -> AdapterSpec:
    """Resolve an adapter against a base model's configuration, without its weights.

    Raises:
        AdapterError: No module matches, or the rank is above a module's size.
    """
    linears, heads = _linear_shapes(model_config)
    wanted = {part.strip() for part in config.target_modules.split(",") if part.strip()}
    if wanted == {"all-linear"}:
        modules = {name: shape for name, shape in linears.items() if name not in heads}
    else:
        matched = {t: [n for n in linears if _matches(n, t)] for t in wanted}
        missing = sorted(target for target, names in matched.items() if not names)
        if missing or not wanted:
            known = sorted({name.rsplit(".", 1)[-1] for name in linears})
            raise AdapterError(
                f"adapter.target-modules: {', '.join(missing) or 'nothing named'}: no "
                f"such linear layer in this model; it has {', '.join(known)}"
            )
        chosen = {name for names in matched.values() for name in names}
        if chosen & heads:
            raise AdapterError(
                f"adapter.target-modules: {', '.join(sorted(chosen & heads))} is the "
                "output head, which is not adapted; leave it out"
            )
        modules = {name: linears[name] for name in chosen}
    if not modules:
        raise AdapterError(
            "adapter.target-modules: this model has no linear layer to adapt"
        )
    largest = min(min(shape) for shape in modules.values())
    if config.rank > largest:
        raise AdapterError(
            f"adapter.rank: must be at most {largest}, the smallest side of the target "
            f"modules (got {config.rank})"
        )
    return AdapterSpec(
        kind=config.kind,
        rank=config.rank,
        alpha=config.alpha,
        dropout=config.dropout,
        target_modules=_peft_targets(set(modules), set(linears)),
        modules=dict(sorted(modules.items())),
        seed=seed,
    )


def initial_arrays(spec: AdapterSpec) -> Arrays:
    """Return the trained values of an adapter that leaves the base unchanged."""
    arrays: Arrays = {}
    for name, shape in spec.trained_shapes.items():
        if name.endswith("lora_A.weight"):
            # PEFT's own start of A: uniform, Kaiming with a = sqrt(5).
            bound = 1 / np.sqrt(shape[1])
            draws = _generator(spec.seed, name).uniform(-bound, bound, shape)
            arrays[name] = draws.astype(np.float32)
        else:
            arrays[name] = np.zeros(shape, np.float32)
    return arrays


def lora_arrays(spec: AdapterSpec, trained: Mapping[str, npt.NDArray[Any]]) -> Arrays:
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


def lora_config(spec: AdapterSpec, base_name: str | None = None) -> "LoraConfig":
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


def attach(base: "PreTrainedModel", spec: AdapterSpec) -> "PeftModel":
    """Put the adapter, in float32, on a base model; only the trained values need grad.

    Args:
        base: The (quantised) base model; its linear layers are wrapped in place.
        spec: The adapter.
    """
    import torch
    from peft import get_peft_model
    from torch.nn.utils import parametrize

    with quiet_peft():
        model = get_peft_model(base, lora_config(spec))
    model.requires_grad_(False)
    for module, (out_features, in_features) in spec.modules.items():
        layer = base.get_submodule(module)
        a, b = layer.lora_A["default"], layer.lora_B["default"]
        if spec.kind != "lora":
            with torch.no_grad():
                a.weight.copy_(torch.from_numpy(_fixed_a(spec, module, in_features)))
        if spec.kind == "lora-core":
            left = torch.from_numpy(_fixed_left(spec, module, out_features))
            parametrize.register_parametrization(
                b, "weight", _fixed_left_module(left.to(b.weight.device))
            )
    for parameter in _trained_parameters(model, spec).values():
        parameter.requires_grad_(True)
    set_trained(model, spec, initial_arrays(spec))
    return model


def set_trained(
    model: "PeftModel", spec: AdapterSpec, arrays: Mapping[str, npt.NDArray[Any]]
) -> None:
    """Copy trained values into the model.

    Raises:
        AdapterError: A name is missing or foreign, or a shape differs.
    """
    import torch

    check_arrays(spec, arrays)
    with torch.no_grad():
        for name, parameter in _trained_parameters(model, spec).items():
            parameter.copy_(torch.from_numpy(np.array(arrays[name], np.float32)))


def get_trained(model: "PeftModel", spec: AdapterSpec) -> Arrays:
    """Copy the trained values out of the model."""
    return {
        name: parameter.detach().to("cpu").numpy().astype(np.float32, copy=True)
        for name, parameter in _trained_parameters(model, spec).items()
    }


def check_arrays(spec: AdapterSpec, arrays: Mapping[str, Any]) -> None:
    """Refuse arrays that are not exactly the trained ones of this adapter.

    Raises:
        AdapterError: Names the first array that is missing, foreign or misshapen.
    """
    shapes = spec.trained_shapes
    if foreign := sorted(set(arrays) ^ set(shapes)):
        state = "missing" if foreign[0] in shapes else "not of this adapter"
        raise AdapterError(f"adapter array {foreign[0]}: {state}")
    for name, shape in shapes.items():
        if tuple(np.shape(arrays[name])) != shape:
            raise AdapterError(
                f"adapter array {name}: shape must be {shape} "
                f"(got {tuple(np.shape(arrays[name]))})"
            )


@contextlib.contextmanager
def quiet_peft() -> Iterator[None]:
    """Silence a warning of transformers that is PEFT's to mend: a renamed attribute."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        yield


def _linear_shapes(
    model_config: "PretrainedConfig",
) -> tuple[dict[str, tuple[int, int]], set[str]]:
    """Return every linear layer's (out, in), and the names of output heads."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(model_config, trust_remote_code=False)
    head = model.get_output_embeddings()
    shapes, heads = {}, set()
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            shapes[name] = (module.out_features, module.in_features)
            if module is head:
                heads.add(name)
    return shapes, heads


def _peft_targets(chosen: set[str], linears: set[str]) -> tuple[str, ...]:
    """Return names by which PEFT adapts exactly the chosen modules: short, if they do."""
    short = {name.rsplit(".", 1)[-1] for name in chosen}
    meant = {name for name in linears if name.rsplit(".", 1)[-1] in short}
    return tuple(sorted(short if meant == chosen else chosen))


def _matches(name: str, target: str) -> bool:
    """Tell whether PEFT would take `target` to mean this module."""
    return name == target or name.endswith("." + target)


def _generator(seed: int, name: str) -> np.random.Generator:
    """Return a generator that is the same in every process for a seed and a name."""
    return np.random.default_rng([seed, zlib.crc32(name.encode())])


def _orthonormal_columns(seed: int, name: str, rows: int, columns: int) -> Any:
    """Return a (rows, columns) float32 matrix with orthonormal columns."""
    q, r = np.linalg.qr(_generator(seed, name).standard_normal((rows, columns)))
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


def _trained_parameters(
    model: "PeftModel", spec: AdapterSpec
) -> dict[str, "torch.nn.Parameter"]:
    """Return the model's parameters under the names that travel."""
    base = model.get_base_model()
    parameters = {}
    for name in spec.trained_shapes:
        module, side = name.removeprefix(PREFIX).removesuffix(".weight").rsplit(".", 1)
        layer = base.get_submodule(module)
        if side == "lora_core":
            parameters[name] = layer.lora_B["default"].parametrizations.weight.original
        else:
            parameters[name] = getattr(layer, side)["default"].weight
    return parameters
