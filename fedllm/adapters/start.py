"""The trained values of an adapter folder, ours or plain PEFT's, for a run to start from."""

from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from fedllm.adapters.files import read_base_name, read_config, weights_path
from fedllm.adapters.kinds import kind_of
from fedllm.adapters.peft_model import check_arrays, peft_arrays, peft_config
from fedllm.adapters.spec import AdapterSpec, Arrays
from fedllm.errors import AdapterError, ModelError
from fedllm.foreign_text import printable
from fedllm.models.location import fingerprint, locate

# Of PEFT's configuration: these say where an adapter is from, or how it was trained.
_NO_MATTER = {
    "auto_mapping",
    "base_model_name_or_path",
    "inference_mode",
    "init_lora_weights",
    "init_ia3_weights",
    "init_weights",
    "lora_dropout",
    "peft_version",
    "projection_prng_key",
    "revision",
    "save_projection",
    # Which modules have weights is seen in the weights.
    "target_modules",
    "task_type",
    "vera_dropout",
}
_RELATIVE, _ABSOLUTE = 1e-4, 1e-5
"""float16 would not pass; a fixed factor of another seed is off by far more."""


def start_arrays(folder: Path, spec: AdapterSpec, base: str, home: Path) -> Arrays:
    """Return the trained values of an adapter in a folder.

    Args:
        folder: PEFT's format, in safetensors.
        spec: The adapter of the run.
        base: The base model of the run, as `locate` returned it.
        home: fedllm's folder.

    Raises:
        AdapterError: The folder holds no such adapter: it is missing, damaged, or made for
            another base model, kind, rank, scale, target modules or fixed factors.
    """
    _require_same_base(folder, base, home)
    _require_same_config(folder, spec)
    path = weights_path(folder)
    try:
        arrays = {
            name: array.astype(np.float32) for name, array in load_file(path).items()
        }
    except (SafetensorError, OSError, TypeError) as error:
        raise AdapterError(f"{path}: damaged: {error}") from None
    try:
        trained = kind_of(spec.kind).trained_arrays(spec, arrays)
        check_arrays(spec, trained)
    except (KeyError, ValueError, AdapterError) as error:
        raise AdapterError(
            f"{path}: is no {spec.kind} adapter of rank {spec.rank} on "
            f"{', '.join(spec.target_modules)}: {_text(error)}; set adapter.kind, "
            "adapter.rank and adapter.target-modules to its own"
        ) from None
    if not all(np.isfinite(array).all() for array in trained.values()):
        raise AdapterError(f"{path}: holds values that are not finite")
    whole = peft_arrays(spec, trained)
    for name in sorted(set(whole) | set(arrays)):
        if name not in whole or name not in arrays:
            raise AdapterError(
                f"{path}: {printable(name)} is "
                f"{'missing' if name in whole else 'not of this adapter'}: set "
                "adapter.target-modules to the adapter's own"
            )
        if not np.allclose(whole[name], arrays[name], _RELATIVE, _ABSOLUTE):
            raise AdapterError(
                f"{path}: {name} is fixed in kind {spec.kind!r}, and other than with "
                f"seed {spec.seed}: set seed to that of its run, or adapter.kind='lora'"
            )
    return trained


def _require_same_base(folder: Path, base: str, home: Path) -> None:
    """Raise if an adapter was made for another base model.

    Raises:
        AdapterError: It was, or there is no adapter, or its base cannot be found.
    """
    named = read_base_name(folder)
    try:
        same = named == base or fingerprint(locate(named, home)) == fingerprint(base)
    except (ModelError, OSError) as error:
        raise AdapterError(
            f"{folder}: the base model that it names cannot be compared with this run's "
            f"{base}: {error}"
        ) from None
    if not same:
        raise AdapterError(
            f"{folder}: made for the base model {printable(named)}, and this run's is "
            f"{base}: set model.name"
        )


def _require_same_config(folder: Path, spec: AdapterSpec) -> None:
    """Raise if an adapter's configuration means another function of its weights.

    Raises:
        AdapterError: Names the first key that differs.
    """
    given = read_config(folder)
    ours = peft_config(spec).to_dict()
    for key, value in ours.items():
        if key in _NO_MATTER or key not in given:
            continue
        if _plain(given[key]) != _plain(value):
            raise AdapterError(
                f"{folder}: {key} is {printable(str(given[key]))}, and "
                f"{_plain(value)} in this run"
                + (": set adapter.alpha" if key == "lora_alpha" else "")
                + (": set adapter.rank" if key == "r" else "")
            )


def _plain(value: Any) -> Any:
    """Return a value of PEFT's configuration as JSON holds it."""
    if isinstance(value, (set, tuple, list)):
        return sorted(map(str, value))
    value = getattr(value, "value", value)
    # JSON has no difference between nothing, false and an empty list of exceptions.
    return value or None


def _text(error: Exception) -> str:
    """Return an error's text; a KeyError's is the name of a weight."""
    if isinstance(error, KeyError):
        return f"{error.args[0]} is missing"
    return str(error)
