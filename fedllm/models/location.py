"""Where a base model is and which one it is: its folder or commit, configuration and hash."""

import hashlib
import re
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedllm.errors import ModelError
from fedllm.foreign_text import printable
from fedllm.models import builtin
from fedllm.models.known import BUILT_IN_MODEL
from fedllm.models.load_errors import loading_errors
from fedllm.models.manifest import folder_digest

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_ADAPTER_FILE = "adapter_config.json"
_CONFIG = "config.json"
_HUB_ID = re.compile(r"(?P<name>[\w.-]+(/[\w.-]+)?)(@(?P<commit>[0-9a-f]{40}))?")


def locate(name: str, home: Path) -> str:
    """Return the place of the base model, fetching the built-in one on first use.

    Args:
        name: The built-in model's name, a local folder, or a hub id.
        home: The program's folder.

    Returns:
        An absolute folder, or the hub id.

    Raises:
        ModelError: The folder does not exist or holds no model, the name is no hub id
            either, or the built-in model cannot be fetched.
    """
    if name == BUILT_IN_MODEL.name:
        return str(builtin.fetch(home).resolve())
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ModelError(
                f"{folder.resolve()} holds no model: it has no config.json;"
                " model.name takes a folder that transformers' save_pretrained made"
            )
        if (folder / _ADAPTER_FILE).exists():
            raise ModelError(_adapter_in_base(str(folder.resolve())))
        return str(folder.resolve())
    if name.startswith(("/", ".", "~")) or not _HUB_ID.fullmatch(name):
        raise ModelError(
            f"{name} is not a folder on this machine; model.name takes "
            f"{BUILT_IN_MODEL.name}, a folder, or a hub id such as "
            f"{BUILT_IN_MODEL.hub_name}, alone or pinned by @ and a commit of 40 "
            "hexadecimal digits"
        )
    return name


def repository(location: str) -> tuple[str, str | None]:
    """Return the hub's name of a location, and the commit that it is pinned to, if any.

    Args:
        location: What `locate` returned.
    """
    found = None if Path(location).is_dir() else _HUB_ID.fullmatch(location)
    return (location, None) if found is None else (found["name"], found["commit"])


@lru_cache(maxsize=8)
def commit_of(location: str) -> str | None:
    """Return the commit of a hub id that all of this process takes; None for a folder.

    Without a pin it is the hub's newest when the process first asks: configuration, weights
    and tokenizer are of one commit, whatever is pushed meanwhile.

    Raises:
        ModelError: The hub is out of reach and the model is not in its cache.
    """
    if Path(location).is_dir():
        return None
    from transformers.utils import cached_file

    name, commit = repository(location)
    if commit is not None:
        return commit
    with loading_errors(location):
        found = re.search(
            r"/snapshots/([0-9a-f]{40})/", str(cached_file(name, _CONFIG))
        )
        if found is None:
            raise OSError(f"its {_CONFIG} is of no commit")
        return found[1]


def load_options(location: str) -> dict[str, Any]:
    """Return the arguments by which transformers finds a model and runs no code of it."""
    source = {"trust_remote_code": False, "revision": commit_of(location)}
    name, _ = repository(location)
    return {
        "pretrained_model_name_or_path": name,
        **{key: value for key, value in source.items() if value is not None},
    }


def require_at_hand(location: str, wanted_by: str) -> None:
    """Check that a model is on this machine, before a hub is asked for it.

    Args:
        location: What `locate` returned, or what an adapter names.
        wanted_by: Who named the model; begins the error.

    Raises:
        ModelError: It is a hub id, and not in the hub's cache.
    """
    if Path(location).is_dir():
        return
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    name, commit = repository(location)
    try:
        found = try_to_load_from_cache(name, _CONFIG, revision=commit)
    except HFValidationError:
        # No hub has it: loading it names the remedy.
        return
    if not isinstance(found, str):
        raise ModelError(
            f"{wanted_by}: its base model {printable(name)} is not on this machine: "
            "--fetch-base lets the hub be asked for it"
        )


def _adapter_in_base(location: str) -> str:
    """Return why a base with an adapter beside it is refused.

    transformers would put that adapter into what is taken for the frozen base, or take the
    weights from the repository that the adapter names.
    """
    return (
        f"{location} holds an adapter ({_ADAPTER_FILE}) and not a base model alone: name"
        " the model that it was made for, or one that `fedllm export` has merged"
    )


def load_config(location: str) -> "PretrainedConfig":
    """Return the model's configuration, without its weights.

    Raises:
        ModelError: It cannot be read or reached, is no causal language model, needs
            code of its own, or is quantised already.
    """
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    )

    if not Path(location).is_dir() and _hub_has_adapter(location):
        raise ModelError(_adapter_in_base(location))
    with loading_errors(location):
        config = AutoConfig.from_pretrained(**load_options(location))
    if config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise ModelError(
            f"{location} is a {config.model_type} model, which does not generate text;"
            " model.name takes a causal language model"
        )
    if getattr(config, "quantization_config", None) is not None:
        raise ModelError(
            f"{location} is quantised already: name the model that it was made from,"
            " and set model.quantization (0, 4 or 8)"
        )
    return config


def _hub_has_adapter(location: str) -> bool:
    """Return whether a hub repository holds an adapter, as transformers looks for one."""
    from transformers.utils import find_adapter_config_file

    name, commit = repository(location)[0], commit_of(location)
    with loading_errors(location):
        return find_adapter_config_file(name, revision=commit) is not None


def fingerprint(location: str) -> str:
    """Return the fingerprint of a base model without hashing every byte.

    For a folder it covers name, size and last megabyte of each file of weights, and the
    configuration; for a hub id the commit.
    """
    folder = Path(location)
    if not folder.is_dir():
        return f"{repository(location)[0]} {commit_of(location)}"
    digest = hashlib.sha256()
    weights = [*folder.glob("*.safetensors"), *folder.glob("*.bin")]
    for path in [*sorted(weights), folder / "config.json"]:
        size = path.stat().st_size
        with path.open("rb") as file:
            file.seek(max(0, size - (1 << 20)))
            digest.update(f"{path.name} {size} ".encode() + file.read())
    return f"{folder.name} {digest.hexdigest()[:16]}"


def base_digest(location: str, home: Path) -> str:
    """Return what two machines compare to know that they hold the same base model.

    For a folder it covers all weights, the configuration and the tokenizer; for a hub id
    the commit.

    Args:
        location: What `locate` returned.
        home: The program's folder, which keeps the hashes.

    Raises:
        ModelError: The model cannot be read or reached, or a file that we made has changed.
    """
    if Path(location).is_dir():
        return folder_digest(Path(location), home)
    return fingerprint(location)
