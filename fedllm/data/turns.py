"""Turns: chat messages as people write them, in the one form that chat templates take.

Known are OpenAI's messages (role and content, parts, tool calls, weight) and ShareGPT's
(from and value), as lists or as the JSON text that a table holds.
"""

import json
from collections.abc import Mapping
from datetime import date, time
from decimal import Decimal
from typing import Any

from fedllm.errors import DataError

Message = dict[str, Any]
"""A turn: `role` and `content`, and of the rest what chat templates read."""

USER, ASSISTANT, SYSTEM, TOOL = "user", "assistant", "system", "tool"
ROLES: Mapping[str, str] = {
    "user": USER,
    "human": USER,
    "prompter": USER,
    "assistant": ASSISTANT,
    "gpt": ASSISTANT,
    "chatgpt": ASSISTANT,
    "model": ASSISTANT,
    "bot": ASSISTANT,
    "ai": ASSISTANT,
    "function_call": ASSISTANT,
    "system": SYSTEM,
    "developer": SYSTEM,
    "tool": TOOL,
    "function": TOOL,
    "observation": TOOL,
    "ipython": TOOL,
}
"""What people call a role, in lower case. Any other is left to the chat template."""

PLAIN = (int, float, Decimal, date, time)
"""Kinds of values, besides text, that are text as they are written."""

_EXTRAS = ("tool_call_id", "name", "reasoning_content", "thinking")


class UnusableRowError(DataError):
    """Nothing can be learned from a row; the text is the reason, and quotes no row."""


def read_text(value: object, what: str) -> str:
    """Return a cell as text: a number by its digits, a missing one as the empty text.

    Raises:
        UnusableRowError: It is of another kind.
    """
    if value is None:
        return ""
    if isinstance(value, PLAIN) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        raise UnusableRowError(f"{what} is not text")
    return value


def read_turns(value: object, column: str) -> list[Message]:
    """Return the turns of a cell; none if it is empty.

    A turn that the row marks by `weight` 0 keeps that key, and is not learned.

    Raises:
        UnusableRowError: It holds no turns.
    """
    if isinstance(value, str):
        value = parse_json(value, column)
    turns = value if isinstance(value, list) else [value] if value else []
    return [_read_turn(turn, column) for turn in turns]


def holds_turns(value: object) -> bool:
    """Return whether a cell is a list of turns, or such a list as JSON text."""
    if isinstance(value, str):
        if not value.lstrip().startswith("["):
            return False
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return False
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(turn, dict) and _role(turn) is not None for turn in value)
    )


def parse_json(text: str, column: str) -> Any:
    """Return what a cell holds as JSON text; None if it is blank.

    Raises:
        UnusableRowError: It is none.
    """
    if not text.strip():
        return None
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise UnusableRowError(f"column {column!r} is not JSON") from None


def turn_of(role: str, content: str) -> Message:
    """Return a turn of plain text."""
    return {"role": role, "content": content}


def _role(turn: Mapping[str, Any]) -> str | None:
    role = turn.get("role")
    role = turn.get("from") if role is None else role
    return role if isinstance(role, str) else None


def _read_turn(turn: object, column: str) -> Message:
    role = _role(turn) if isinstance(turn, dict) else None
    if not isinstance(turn, dict) or role is None:
        raise UnusableRowError(
            f"column {column!r}: a turn without role and content, or from and value"
        )
    name = role.strip().lower()
    content = next(
        (
            turn[key]
            for key in ("content", "value", "text")
            if turn.get(key) is not None
        ),
        None,
    )
    if name == "function_call":
        return _read_function_call(content)
    message = turn_of(ROLES.get(name, role), _read_content(content))
    for key in _EXTRAS:
        if isinstance(turn.get(key), str):
            message[key] = turn[key]
    if turn.get("tool_calls"):
        message["tool_calls"] = _read_tool_calls(turn["tool_calls"])
    if turn.get("weight") == 0 or turn.get("train") is False:
        message["weight"] = 0
    return message


def _read_content(content: object) -> str:
    """Return a turn's text: a string, or parts of which each is text."""
    if not isinstance(content, list):
        return read_text(content, "a turn's content")
    texts = []
    for part in content:
        if isinstance(part, dict) and part.get("type", "text") == "text":
            part = part.get("text")
        if not isinstance(part, str):
            raise UnusableRowError("a turn holds a part that is not text")
        texts.append(part)
    return "".join(texts)


def _read_tool_calls(calls: object) -> list[Any]:
    """Return tool calls with their arguments as objects, which templates write as JSON."""
    calls = parse_json(calls, "tool_calls") if isinstance(calls, str) else calls
    if not isinstance(calls, list):
        raise UnusableRowError("tool_calls is no list")
    return [_read_tool_call(call) for call in calls]


def _read_tool_call(call: object) -> Message:
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise UnusableRowError("a tool call without the name of its function")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        arguments = parse_json(arguments, "arguments of a tool call")
    read: Message = {
        "type": "function",
        "function": {"name": function["name"], "arguments": arguments or {}},
    }
    if isinstance(call, dict) and isinstance(call.get("id"), str):
        read["id"] = call["id"]
    return read


def _read_function_call(content: object) -> Message:
    """Return ShareGPT's turn `function_call`, whose text is the call."""
    if isinstance(content, str):
        content = parse_json(content, "function_call")
    calls = content if isinstance(content, list) else [content]
    return turn_of(ASSISTANT, "") | {"tool_calls": _read_tool_calls(calls)}
