"""Columns: which of a row's cells are used, by the settings and by names that people give.

All of it goes by one row alone: under record level no row may change how another is read.
"""

import json
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any

from fedllm.config import DataConfig

Row = dict[str, Any]
"""One row of a data set: column -> cell."""

MESSAGES = ("messages", "conversations", "conversation")
QUESTIONS = ("instruction", "prompt", "question", "query", "problem", "input")
ANSWERS = ("response", "output", "completion", "answer", "solution")
INPUTS = ("input", "context")
SYSTEMS = ("system", "system_prompt")
TOOLS = ("tools", "functions")
PREFERENCES = ("chosen", "rejected")

LINE = "fedllm: line"
"""Where a row stands, as its file's owner counts: `7`, or `part.csv:7` in a folder."""
UNREADABLE = "fedllm: unreadable"
"""Why a row cannot be used, found when it was read."""

_DEFAULTS = DataConfig()
# Begins a cell of a data set that was a list or an object.
_NESTED = "\0fedllm: "


def question_columns(config: DataConfig) -> tuple[str, ...]:
    """Return the columns that may hold the question, the first choice first."""
    return _named_or(config.prompt_column, _DEFAULTS.prompt_column, QUESTIONS)


def answer_columns(config: DataConfig) -> tuple[str, ...]:
    """Return the columns that may hold the answer, the first choice first."""
    return _named_or(config.response_column, _DEFAULTS.response_column, ANSWERS)


def input_columns(config: DataConfig) -> tuple[str, ...]:
    """Return the columns that may hold what stands after the question."""
    return _by_setting(config.input_column, INPUTS)


def system_columns(config: DataConfig) -> tuple[str, ...]:
    """Return the columns that may hold the system turn."""
    return _by_setting(config.system_column, SYSTEMS)


def _named_or(name: str, default: str, usual: tuple[str, ...]) -> tuple[str, ...]:
    return usual if name == default else (name,)


def _by_setting(name: str, usual: tuple[str, ...]) -> tuple[str, ...]:
    if name == "auto":
        return usual
    return (name,) if name else ()


def first_of(row: Row, names: Iterable[str]) -> str | None:
    """Return the first of some columns that a row has a value in, if any."""
    return next((name for name in names if row.get(name) is not None), None)


@lru_cache(maxsize=16)
def _used_columns(config: DataConfig) -> dict[str, str]:
    """Return each column that may be used, by its own name and by its plain one."""
    names = (
        *MESSAGES,
        *question_columns(config),
        *answer_columns(config),
        *input_columns(config),
        *system_columns(config),
        *TOOLS,
        *PREFERENCES,
        config.text_column,
        config.person_column,
        config.partition_column,
        LINE,
        UNREADABLE,
    )
    used = {name: name for name in names if name}
    for name in list(used):
        used.setdefault(_plain(name), name)
    return used


def column_of(config: DataConfig, name: str) -> str | None:
    """Return the name under which a column is used; None for one that is not.

    `Response`, ` response` and `response` are one column.
    """
    used = _used_columns(config)
    return used.get(name) or used.get(_plain(name))


def used_part(config: DataConfig, row: Mapping[str, Any]) -> Row:
    """Return the cells of a row that are used, by the names that the settings know.

    Of two columns that differ in case or blanks alone, the one spelled as the settings
    have it is taken, else the first.
    """
    used: Row = {}
    for name, cell in row.items():
        column = column_of(config, name)
        if column is None or (column != name and column in row):
            continue
        used.setdefault(column, cell)
    return used


def as_cell(value: Any) -> str:
    """Return a list or an object as text that a table takes as it is.

    A table would give each turn and each tool call the keys of all others.
    """
    return _NESTED + json.dumps(value, default=str)


def restored(row: Row) -> Row:
    """Return a row with what `as_cell` made text as it was."""
    return {name: _restored(cell) for name, cell in row.items()}


def _restored(cell: Any) -> Any:
    if not isinstance(cell, str) or not cell.startswith(_NESTED):
        return cell
    try:
        return json.loads(cell.removeprefix(_NESTED))
    except (ValueError, RecursionError):
        return cell


def _plain(name: str) -> str:
    return "".join(name.replace("_", " ").replace("-", " ").split()).casefold()
