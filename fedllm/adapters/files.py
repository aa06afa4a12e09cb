"""Adapters on disk: PEFT's own format, safetensors only."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy.typing as npt

from fedllm.adapters.kinds import KINDS, mend_layers
from fedllm.adapters.linear_layers import linear_shape
from fedllm.adapters.peft_model import peft_arrays, peft_config, quiet_peft
from fedllm.adapters.spec import PREFIX, AdapterSpec
from fedllm.errors import AdapterError
from fedllm.foreign_text import printable
from fedllm.models.location import repository

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_WEIGHTS_FILE = "adapter_model.safetensors"
_CONFIG_FILE = "adapter_config.json"
_ORIGIN_FILE = "fedllm.json"
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
_TEMPLATE_FILE = "chat_template.jinja"

# Last part of a weight's name in PEFT -> the shapes that it may have.
_FILE_SHAPES = {
    side: shapes for kind in KINDS.values() for side, shapes in kind.file_shapes.items()
}
_METHODS = list(dict.fromkeys(kind.peft_method for kind in KINDS.values()))
_PEFT_TYPES = [method.upper() for method in _METHODS]


def save_adapter(
    folder: Path,
    spec: AdapterSpec,
    trained: Mapping[str, npt.NDArray[Any]],
    base_name: str,
    origin: Mapping[str, Any],
) -> None:
    """Write an adapter that PEFT alone can open.

    Args:
        folder: The folder, which is made if it is missing.
        spec: The adapter.
        trained: The trained values.
        base_name: Folder or hub id that PEFT loads the base model from.
        origin: What `fedllm evaluate` reports of the adapter: model, quantisation, round.
    """
    from safetensors.numpy import save_file

    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        peft_arrays(spec, trained), folder / _WEIGHTS_FILE, metadata={"format": "pt"}
    )
    config = peft_config(spec, base_name)
    config.inference_mode = True
    config.save_pretrained(str(folder))
    about = {**origin, "adapter": {**asdict(spec), "modules": len(spec.modules)}}
    text = json.dumps(about, indent=2)
    (folder / _ORIGIN_FILE).write_text(text, encoding="utf-8")


def read_origin(folder: Path) -> dict[str, Any]:
    """Return the origin that `save_adapter` wrote; empty for plain PEFT."""
    path = folder / _ORIGIN_FILE
    return dict(json.loads(path.read_text("utf-8"))) if path.exists() else {}


def read_base_name(folder: Path) -> str:
    """Return the base model that an adapter folder names, with its commit if it has one.

    Raises:
        AdapterError: There is no adapter that PEFT can open without pickle.
    """
    if not folder.is_dir():
        raise AdapterError(
            f"{folder}: no such folder; --peft-path names a peft_<round>, peft_best or "
            "peft_final folder of a run"
        )
    for name in (_CONFIG_FILE, _WEIGHTS_FILE):
        if not (folder / name).is_file():
            raise AdapterError(
                f"{folder}: not a PEFT adapter in safetensors, since {name} is missing"
            )
    config = read_config(folder)
    _check_config(folder / _CONFIG_FILE, config)
    base_name = config.get("base_model_name_or_path")
    if not isinstance(base_name, str) or not base_name:
        raise AdapterError(
            f"{folder / _CONFIG_FILE}: names no base model: set base_model_name_or_path"
        )
    revision = config.get("revision")
    if revision in (None, "main") or Path(base_name).is_dir():
        return base_name
    if not repository(pinned := f"{base_name}@{revision}")[1]:
        raise AdapterError(
            f"{folder / _CONFIG_FILE}: revision must be a commit of 40 hexadecimal digits "
            f"(got {printable(revision)!r})"
        )
    return pinned


def read_config(folder: Path) -> dict[str, Any]:
    """Return PEFT's configuration of an adapter, unchecked.

    Raises:
        AdapterError: It cannot be read.
    """
    try:
        return dict(json.loads((folder / _CONFIG_FILE).read_text("utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise AdapterError(
            f"{folder / _CONFIG_FILE}: cannot be read: {error}"
        ) from None


def weights_path(folder: Path) -> Path:
    """Return the file of an adapter's weights."""
    return folder / _WEIGHTS_FILE


def _check_config(path: Path, config: Mapping[str, Any]) -> None:
    """Check that a configuration is of a known method, before PEFT sees it.

    PEFT has types that load further adapters or models, by names that the file holds.

    Raises:
        AdapterError: Its type, or one of its keys, is not of the closed list.
    """
    method = config.get("peft_type")
    if not isinstance(method, str) or method not in _PEFT_TYPES:
        raise AdapterError(
            f"{path}: peft_type must be one of {', '.join(_PEFT_TYPES)} (got {method!r})"
        )
    if foreign := sorted(set(config) - _known_keys(method)):
        raise AdapterError(
            f"{path}: {', '.join(foreign)}: PEFT's {method} of this version has no such "
            "key; remove it if you know what it is for"
        )


def _known_keys(method: str) -> set[str]:
    """Return the keys that PEFT's configuration of a method has here."""
    from dataclasses import fields

    from peft import PEFT_TYPE_TO_CONFIG_MAPPING

    names = {field.name for field in fields(PEFT_TYPE_TO_CONFIG_MAPPING[method])}
    return names | {"auto_mapping", "peft_version"}


def load_adapter_tokenizer(folder: Path, base_name: str) -> "PreTrainedTokenizerBase":
    """Return the tokenizer that an adapter was trained with.

    Args:
        folder: The adapter. If it holds a tokenizer, or a chat template alone, they are its
            own, else the base's.
        base_name: What `read_base_name` returned.

    Raises:
        AdapterError: Its tokenizer has tokens that the base model has no embedding for.
        ModelError: A tokenizer cannot be read.
    """
    from fedllm.models.loading import load_tokenizer
    from fedllm.models.location import load_config

    tokenizer = load_tokenizer(base_name)
    if any((folder / name).is_file() for name in _TOKENIZER_FILES):
        known = tokenizer.get_vocab()
        tokenizer = load_tokenizer(str(folder))
        size = load_config(base_name).get_text_config().vocab_size
        added = [
            token
            for token, number in tokenizer.get_vocab().items()
            if number >= size and token not in known
        ]
        if added:
            raise AdapterError(
                f"{folder}: its tokenizer has {len(added)} tokens for which the base model "
                f"has no embedding ({printable(', '.join(sorted(added)[:3]))}): resize and "
                "save the base model first, and name that one in adapter_config.json"
            )
    elif (folder / _TEMPLATE_FILE).is_file():
        tokenizer.chat_template = (folder / _TEMPLATE_FILE).read_text("utf-8")
    return tokenizer


def load_adapter(base: "PreTrainedModel", folder: Path) -> "PeftModel":
    """Attach a saved adapter, ours or plain PEFT's, to a base model for inference.

    Raises:
        AdapterError: It is missing or damaged, or made for another base model.
    """
    from peft import PeftModel
    from safetensors import SafetensorError, safe_open

    read_base_name(folder)
    try:
        with safe_open(str(folder / _WEIGHTS_FILE), framework="np") as file:
            shapes = {
                key: tuple(file.get_slice(key).get_shape())
                for key in file.keys()  # noqa: SIM118 - not a dict
            }
    except (SafetensorError, OSError) as error:
        raise AdapterError(f"{folder / _WEIGHTS_FILE}: damaged: {error}") from None
    _check_shapes(base, folder, shapes)
    try:
        with quiet_peft():
            model = PeftModel.from_pretrained(base, str(folder), is_trainable=False)
    except (RuntimeError, KeyError, ValueError, TypeError) as error:
        text = str(error).strip().splitlines()
        raise AdapterError(
            f"{folder}: PEFT cannot open it on this base model: "
            # The first line of torch's names only the class; the cause is in the next.
            f"{type(error).__name__}: {' '.join(line.strip() for line in text[:2])}"
        ) from None
    mend_layers(model)
    return model


def _check_shapes(
    base: "PreTrainedModel", folder: Path, shapes: Mapping[str, tuple[int, ...]]
) -> None:
    """Check the shapes of saved weights against the base model's layers.

    Raises:
        AdapterError: Names the first weight that is of another base model.
    """
    known = 0
    for key, shape in shapes.items():
        name = key.removeprefix(PREFIX).removesuffix(".weight")
        module, _, side = name.rpartition(".")
        if side not in _FILE_SHAPES:
            continue
        known += 1
        try:
            layer: Any = base.get_submodule(module)
        except AttributeError:
            raise AdapterError(
                f"{folder}: made for another base model: it adapts {module}, which "
                "this one lacks"
            ) from None
        outward, inward = linear_shape(layer) or (None, None)
        sizes = {"in": inward, "out": outward, "r": None, "1": 1}
        expected = [[sizes[word] for word in form] for form in _FILE_SHAPES[side]]
        if not any(_is_like(shape, form) for form in expected):
            raise AdapterError(
                f"{folder}: made for another base model: {key} has shape {shape}, and "
                f"this one's layer has {inward} inputs and {outward} outputs"
            )
    if not known:
        raise AdapterError(
            f"{folder / _WEIGHTS_FILE}: holds no {', '.join(_METHODS[:-1])} or "
            f"{_METHODS[-1]} weights under PEFT's names"
        )


def _is_like(shape: tuple[int, ...], form: list[int | None]) -> bool:
    """Return whether a shape has a form, in which None stands for any size."""
    return len(shape) == len(form) and all(
        want in (None, got) for got, want in zip(shape, form, strict=True)
    )
