"""Parse a flat run config into the frozen sections of `fedllm.config`, or name every bad key."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from pydantic import TypeAdapter, ValidationError

from fedllm.config import RunConfig, Scalar, flat
from fedllm.config_rules import contradictions
from fedllm.errors import ConfigError

_ADAPTER: TypeAdapter[RunConfig] = TypeAdapter(RunConfig)


def parse_run_config(mapping: Mapping[str, Scalar]) -> RunConfig:
    """Return the sections of a flat run config, checked.

    Args:
        mapping: Dotted kebab-case key -> value, as in Flower's `context.run_config`.

    Returns:
        The frozen sections; keys that are missing have their defaults.

    Raises:
        ConfigError: One line a bad key: key, what is allowed, value got.
    """
    nested: dict[str, Any] = {}
    problems: list[str] = []
    for key, value in mapping.items():
        section, _, name = key.rpartition(".")
        if section and not isinstance(nested.setdefault(section, {}), dict):
            problems.append(f"{key}: {section} is not a section")
        else:
            (nested[section] if section else nested)[name] = value
    try:
        config = _ADAPTER.validate_python(nested, by_name=False, by_alias=True)
    except ValidationError as error:
        for detail in error.errors():
            key = ".".join(str(part) for part in detail["loc"])
            got = detail["input"]
            got_text = "" if isinstance(got, dict) else f" (got {got!r})"
            problems.append(f"{key}: {_reason(detail)}{got_text}")
    else:
        problems += contradictions(config)
    if problems:
        raise ConfigError("\n".join(sorted(problems)))
    if config.train.objective == "dpo":
        # All that reads rows knows `data` alone.
        return replace(config, data=replace(config.data, format="preference"))
    return config


def _reason(detail: Any) -> str:
    """Return one pydantic error in plain words."""
    kind = detail["type"]
    if kind in ("unexpected_keyword_argument", "extra_forbidden"):
        return f"unknown key{_similar_key(detail['loc'])}"
    message = str(detail["msg"])
    for old, new in (
        ("Value error, ", ""),
        ("Input should be ", "must be "),
        ("a valid integer", "an integer"),
        ("a valid ", "a "),
        ("greater than or equal to", ">="),
    ):
        message = message.replace(old, new)
    return message


def _similar_key(location: tuple[str | int, ...]) -> str:
    """Return a hint naming the key that was probably meant, or nothing."""
    from difflib import get_close_matches

    typed = ".".join(str(part) for part in location)
    near = get_close_matches(typed, flat(RunConfig()), n=1)
    return f"; did you mean {near[0]}?" if near else ""
