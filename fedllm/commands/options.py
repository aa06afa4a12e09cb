"""The run config as `flwr run .` would have it: pyproject's, then what was typed."""

import argparse
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedllm.config import RunConfig, Scalar, flat, parse_run_config
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


def read_config(path: Path) -> RunConfig:
    """Read a run config as `flwr run --run-config FILE` does.

    Raises:
        ConfigError: The file cannot be read, or holds what no run would take.
    """
    try:
        content = tomllib.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"--run-config: {path}: {error}") from None
    mapping: dict[str, Any] = {}
    for key, value in content.items():
        if isinstance(value, dict):
            mapping |= {f"{key}.{inner}": v for inner, v in value.items()}
        else:
            mapping[key] = value
    config = parse_run_config(mapping)
    if config.privacy.unit == "record":
        raise ConfigError(
            "privacy.unit: compare knows 'client' and 'none' (got 'record')"
        )
    return config


def positive_int(text: str) -> int:
    """Read a whole number of at least 1; argparse shows the error."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1 (got {text})")
    return value


def temperature(text: str) -> float:
    """Read a finite number of at least 0; argparse shows the error."""
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be finite and at least 0 (got {text})")
    return value
