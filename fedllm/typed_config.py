"""The run config as `flwr run .` would have it: pyproject's, then what was typed."""

import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedllm.config import RunConfig, Scalar, flat
from fedllm.errors import ConfigError


def typed_config(typed: Sequence[str] = ()) -> dict[str, Scalar]:
    """Return flat settings: the defaults, ./pyproject.toml's, then a file or pairs.

    Args:
        typed: Paths of .toml files, or texts of key=value pairs, as `--run-config`.

    Raises:
        ConfigError: A file or a text cannot be read.
    """
    merged: dict[str, Scalar] = flat(RunConfig())
    project = Path("pyproject.toml")
    if project.is_file():
        content: Any = _read(project)
        for key in ("tool", "flwr", "app", "config"):
            content = content.get(key, {})
        merged.update(_flat(content))
    for text in typed:
        if text.endswith(".toml"):
            merged.update(_flat(_read(Path(text))))
        elif "=" in text:
            merged.update(_pairs(text))
        else:
            raise ConfigError(f"--run-config: neither a .toml nor key=value: {text}")
    return merged


def _read(path: Path) -> dict[str, Any]:
    """Read a TOML file."""
    try:
        return tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        raise ConfigError(
            f"--run-config: {path}: cannot be read: {error.strerror}"
        ) from None
    except ValueError as error:
        raise ConfigError(f"--run-config: {path}: is not TOML: {error}") from None


def _flat(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Scalar]:
    """Join the keys of nested tables by dots, as Flower does."""
    out: dict[str, Scalar] = {}
    for key, value in nested.items():
        if isinstance(value, Mapping):
            out.update(_flat(value, f"{prefix}{key}."))
        else:
            out[prefix + key] = value
    return out


def _pairs(text: str) -> dict[str, Scalar]:
    """Read key=value pairs by Flower's own parser, which costs a second to import."""
    from click import ClickException
    from flwr.common.config import parse_config_args

    try:
        return dict(parse_config_args([text]))
    except (ClickException, ValueError) as error:
        told = getattr(error, "message", error)
        raise ConfigError(f"--run-config: {told}") from None
