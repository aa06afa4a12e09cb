"""One adapter on one base model as PEFT's model: attach it, set and get its values.

How each kind sits on a model and in a file is in `fedllm.adapters.kinds`. Fixed factors come from the public seed, so they never travel and
every process makes the same ones.
"""

import contextlib
import warnings
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from fedllm.adapters.kinds import kind_of
from fedllm.adapters.spec import PREFIX, AdapterSpec, Arrays
from fedllm.errors import AdapterError
from fedllm.models.location import repository

if TYPE_CHECKING:
    import torch
    from peft import PeftConfig, PeftModel
    from transformers import PreTrainedModel


def initial_arrays(spec: AdapterSpec) -> Arrays:
    """Return the trained values of an adapter that leaves the base unchanged."""
    return kind_of(spec.kind).initial_arrays(spec)


def peft_arrays(spec: AdapterSpec, trained: Mapping[str, npt.NDArray[Any]]) -> Arrays:
    """Return all that PEFT needs under PEFT's names, fixed factors included."""
    return kind_of(spec.kind).peft_arrays(spec, trained)


def peft_config(spec: AdapterSpec, base_name: str | None = None) -> "PeftConfig":
    """Return PEFT's configuration of this adapter.

    A hub id that is pinned by @ and a commit becomes PEFT's name and revision.
    """
    name, commit = (base_name, None) if base_name is None else repository(base_name)
    config = kind_of(spec.kind).peft_config(spec, name)
    config.revision = commit
    return config


def attach(base: "PreTrainedModel", spec: AdapterSpec) -> "PeftModel":
    """Attach the adapter, in float32, to a base model; only the trained values need grad.

    Args:
        base: The (quantised) base model; its linear layers are wrapped in place.
        spec: The adapter.
    """
    from peft import get_peft_model

    with quiet_peft():
        model = get_peft_model(base, peft_config(spec))
    model.requires_grad_(False)
    kind_of(spec.kind).freeze_factors(model, spec)
    for parameter in trained_parameters(model, spec).values():
        parameter.requires_grad_(True)
    set_trained(model, spec, initial_arrays(spec))
    return model


def set_trained(
    model: "PeftModel",
    spec: AdapterSpec,
    arrays: Mapping[str, npt.NDArray[Any]],
    rest: "Mapping[str, torch.Tensor]" = MappingProxyType({}),
) -> None:
    """Copy trained values into the model.

    Args:
        model: The base model with the adapter attached.
        spec: The adapter.
        arrays: The values that travel.
        rest: Name -> the last columns, where a node trains the first ones alone.

    Raises:
        AdapterError: A name is missing or foreign, or a shape differs.
    """
    import torch

    check_arrays(spec, arrays)
    with torch.no_grad():
        for name, parameter in trained_parameters(model, spec).items():
            value = torch.from_numpy(np.array(arrays[name], np.float32))
            if name in rest:
                rest[name].copy_(value[:, parameter.shape[1] :])
                value = value[:, : parameter.shape[1]]
            parameter.copy_(value)


def get_trained(
    model: "PeftModel",
    spec: AdapterSpec,
    rest: "Mapping[str, torch.Tensor]" = MappingProxyType({}),
) -> Arrays:
    """Copy the trained values out of the model; arguments as in `set_trained`."""
    import torch

    arrays = {}
    for name, parameter in trained_parameters(model, spec).items():
        value = parameter.detach()
        if name in rest:
            value = torch.cat([value, rest[name]], dim=1)
        arrays[name] = value.to("cpu").numpy().astype(np.float32, copy=True)
    return arrays


def check_arrays(spec: AdapterSpec, arrays: Mapping[str, Any]) -> None:
    """Check that arrays are exactly the trained ones of this adapter.

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
def adapter_off(model: "PeftModel | PreTrainedModel") -> Iterator[None]:
    """Compute as the base alone while the context is open.

    PEFT, when it switches an adapter on again, lets all of it require a gradient, fixed
    factors too, and it does not count how often it was switched off. So both are restored.

    Args:
        model: Any; without an adapter, or with it off already, nothing changes.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [m for m in model.modules() if isinstance(m, BaseTunerLayer)]
    if all(layer.disable_adapters for layer in layers):
        yield
        return
    needs = {p: p.requires_grad for p in model.parameters()}
    try:
        with model.disable_adapter():
            yield
    finally:
        for parameter, needed in needs.items():
            parameter.requires_grad_(needed)


@contextlib.contextmanager
def quiet_peft() -> Iterator[None]:
    """Silence warnings that nobody can act on.

    PEFT uses a renamed attribute; and it sees by itself which way a layer's weight lies.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        warnings.filterwarnings("ignore", "fan_in_fan_out is set to", UserWarning)
        yield


def trained_parameters(
    model: "PeftModel", spec: AdapterSpec
) -> dict[str, "torch.nn.Parameter"]:
    """Return the model's parameters under the names that travel."""
    base = model.get_base_model()
    kind = kind_of(spec.kind)
    parameters = {}
    for module in spec.modules:
        layer = base.get_submodule(module)
        start = f"{PREFIX}{module}."
        for side in spec.trained_tensors(module):
            parameters[start + side] = kind.parameter(layer, side)
    return parameters
