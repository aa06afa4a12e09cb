"""One adapter on one base model: resolved, attached, its trained values in and out.

What the kinds are, and how each hangs on a model and lies on disk, is in
`fedllm.adapter_kinds`. Fixed factors come from the public seed, so they never travel and
every process makes the same ones.
"""

import contextlib
import warnings
from collections.abc import Collection, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from fedllm.adapter_kinds import ia3, lora, vera
from fedllm.adapter_kinds.spec import PREFIX, AdapterSpec, Arrays
from fedllm.config import AdapterConfig
from fedllm.errors import AdapterError

if TYPE_CHECKING:
    import torch
    from peft import PeftConfig, PeftModel
    from transformers import PretrainedConfig, PreTrainedModel

__all__ = ["PREFIX", "AdapterSpec", "Arrays"]


class _Family(Protocol):
    """What a module of `fedllm.adapter_kinds` has."""

    def first_arrays(self, spec: AdapterSpec) -> Arrays: ...

    def peft_arrays(
        self, spec: AdapterSpec, trained: Mapping[str, npt.NDArray[Any]]
    ) -> Arrays: ...

    def peft_config(
        self, spec: AdapterSpec, base_name: str | None = None
    ) -> "PeftConfig": ...

    def fix(self, model: "PeftModel", spec: AdapterSpec) -> None: ...

    def parameter(self, layer: Any, side: str) -> "torch.nn.Parameter": ...


def _family(kind: str) -> _Family:
    """Return the module that knows a kind."""
    match kind:
        case "ia3":
            return ia3
        case "vera":
            return vera
        case _:
            return lora


def adapter_spec(
    config: AdapterConfig, model_config: "PretrainedConfig", seed: int
) -> AdapterSpec:
    """Resolve an adapter against a base model's configuration, without its weights.

    Args:
        config: The adapter's settings, with a kind that is not `auto`.
        model_config: The base model's configuration.
        seed: Public seed of what is fixed.

    Raises:
        AdapterError: No module matches, or the rank is above a module's size.
    """
    linears, heads = _linear_shapes(model_config)
    defaults = _default_modules(config.kind, model_config.model_type)
    return resolve(config, linears, heads, defaults, seed)


def resolve(
    config: AdapterConfig,
    linears: Mapping[str, tuple[int, int]],
    heads: Collection[str],
    defaults: tuple[Collection[str], Collection[str]],
    seed: int,
) -> AdapterSpec:
    """Resolve an adapter against a base model's linear layers, without torch.

    Args:
        config: The adapter's settings, with a kind that is not `auto`.
        linears: Full name of every linear layer -> (out features, in features).
        heads: Names of output heads, which are not adapted.
        defaults: Last parts of the names of the modules that `auto` means, and of those
            whose input is rescaled (IA3).
        seed: Public seed of what is fixed.

    Raises:
        AdapterError: No module matches, or the rank is above a module's size.
    """
    by_default, feedforward = defaults
    wanted = {part.strip() for part in config.target_modules.split(",") if part.strip()}
    if wanted == {"auto"}:
        wanted = set(by_default)
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
        if met := sorted(chosen.intersection(heads)):
            raise AdapterError(
                f"adapter.target-modules: {', '.join(met)} is the "
                "output head, which is not adapted; leave it out"
            )
        modules = {name: linears[name] for name in chosen}
    if not modules:
        raise AdapterError(
            "adapter.target-modules: this model has no linear layer to adapt"
        )
    largest = min(min(shape) for shape in modules.values())
    # IA3 has no rank, and VeRA's may pass a side: its factors are not a decomposition.
    if config.kind not in ("ia3", "vera") and config.rank > largest:
        raise AdapterError(
            f"adapter.rank: must be at most {largest}, the smallest side of the target "
            f"modules (got {config.rank})"
        )
    inward = {m for m in modules if any(_matches(m, f) for f in feedforward)}
    inward_targets = _peft_targets(inward, set(linears))
    outward_targets = _peft_targets(set(modules) - inward, set(linears))
    return AdapterSpec(
        kind=config.kind,
        rank=config.rank,
        alpha=config.alpha,
        dropout=config.dropout,
        target_modules=tuple(sorted({*inward_targets, *outward_targets})),
        modules=dict(sorted(modules.items())),
        seed=seed,
        feedforward=inward_targets,
    )


def initial_arrays(spec: AdapterSpec) -> Arrays:
    """Return the trained values of an adapter that leaves the base unchanged."""
    return _family(spec.kind).first_arrays(spec)


def peft_arrays(spec: AdapterSpec, trained: Mapping[str, npt.NDArray[Any]]) -> Arrays:
    """Return all that PEFT needs under PEFT's names, fixed factors included."""
    return _family(spec.kind).peft_arrays(spec, trained)


def peft_config(spec: AdapterSpec, base_name: str | None = None) -> "PeftConfig":
    """Make PEFT's configuration of this adapter."""
    return _family(spec.kind).peft_config(spec, base_name)


def attach(base: "PreTrainedModel", spec: AdapterSpec) -> "PeftModel":
    """Put the adapter, in float32, on a base model; only the trained values need grad.

    Args:
        base: The (quantised) base model; its linear layers are wrapped in place.
        spec: The adapter.
    """
    from peft import get_peft_model

    with quiet_peft():
        model = get_peft_model(base, peft_config(spec))
    model.requires_grad_(False)
    _family(spec.kind).fix(model, spec)
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


def _default_modules(kind: str, model_type: str) -> tuple[list[str], list[str]]:
    """Return what `auto` means for a kind, and which modules have their input adapted."""
    if kind == "ia3":
        return ia3.default_modules(model_type)
    return ["q_proj", "v_proj"], []


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


def _trained_parameters(
    model: "PeftModel", spec: AdapterSpec
) -> dict[str, "torch.nn.Parameter"]:
    """Return the model's parameters under the names that travel."""
    base = model.get_base_model()
    family = _family(spec.kind)
    parameters = {}
    for module in spec.modules:
        layer = base.get_submodule(module)
        start = f"{PREFIX}{module}."
        for side in spec.trained_sides(module):
            parameters[start + side] = family.parameter(layer, side)
    return parameters
