"""Conversations: turns of a row, of which some are learned."""

from dataclasses import dataclass
from typing import Any

from fedllm.config import DataConfig
from fedllm.data.columns import TOOLS, Row, first_of, input_columns, system_columns
from fedllm.data.turns import (
    ASSISTANT,
    SYSTEM,
    USER,
    Message,
    UnusableRowError,
    holds_turns,
    parse_json,
    read_text,
    read_turns,
    turn_of,
)


@dataclass(frozen=True)
class Conversation:
    """Turns, of which the assistant's are learned.

    Attributes:
        columns: The columns that it is made of.
        turns: Up to the last that is learned.
        learned: Places of the turns that are learned, at least one.
        tools: What the assistant may call, as chat templates take it; None: nothing.
    """

    columns: tuple[str, ...]
    turns: list[Message]
    learned: tuple[int, ...]
    tools: list[Any] | None = None


def may_be_turns(value: object) -> bool:
    """Return whether a cell is turns, well-formed or not, and not text of another kind."""
    return isinstance(value, list) or holds_turns(value)


def read_question(
    config: DataConfig, row: Row, question: str, answers: tuple[str, ...]
) -> tuple[tuple[str, ...], list[Message]]:
    """Return the columns of a question, and its turns.

    Args:
        config: Names the column whose text stands after the question.
        row: The row.
        question: Its column.
        answers: Columns that are no part of it.

    Raises:
        UnusableRowError: It is not text, and no turns.
    """
    if may_be_turns(row[question]):
        return (question,), read_turns(row[question], question)
    columns: tuple[str, ...] = (question,)
    text = read_text(row[question], f"column {question!r}")
    used = (question, *answers)
    more = first_of(row, (name for name in input_columns(config) if name not in used))
    if more is not None:
        columns = (question, more)
        added = read_text(row[more], f"column {more!r}")
        text = "\n\n".join(part for part in (text, added) if part.strip())
    return columns, [turn_of(USER, text)]


def read_answer(row: Row, answer: str) -> list[Message]:
    """Return the turns of an answer's column.

    Raises:
        UnusableRowError: It is not text, and no turns.
    """
    if isinstance(row[answer], dict | list) or holds_turns(row[answer]):
        return read_turns(row[answer], answer)
    return [turn_of(ASSISTANT, read_text(row[answer], f"column {answer!r}"))]


def conversation_of(
    config: DataConfig,
    row: Row,
    before: list[Message],
    turns: list[Message],
    columns: tuple[str, ...],
) -> Conversation:
    """Return a conversation of which the assistant's turns after `before` are learned.

    Args:
        config: Names the system column.
        row: Gives the system turn, and the tools.
        before: Turns that are not learned.
        turns: Those after them.
        columns: Where both come from.

    Raises:
        UnusableRowError: The assistant answers nothing.
    """
    all_turns = [*before, *turns]
    first = len(before)
    system = first_of(row, system_columns(config))
    has_system = any(turn["role"] == SYSTEM for turn in all_turns)
    if system is not None and not has_system:
        text = read_text(row[system], f"column {system!r}")
        if text.strip():
            all_turns.insert(0, turn_of(SYSTEM, text))
            first += 1
            columns = (*columns, system)
    learned = [
        place
        for place in range(first, len(all_turns))
        if _is_learned(all_turns[place]) and _is_asked(all_turns[:place])
    ]
    if not learned:
        raise UnusableRowError(_why_not(all_turns))
    tools = first_of(row, TOOLS)
    kept = [
        {key: value for key, value in turn.items() if key != "weight"}
        for turn in all_turns[: learned[-1] + 1]
    ]
    if tools is None:
        return Conversation(columns, kept, tuple(learned))
    listed = row[tools]
    if isinstance(listed, str):
        listed = parse_json(listed, tools)
    if listed is not None and not isinstance(listed, list):
        raise UnusableRowError(f"column {tools!r} is no list")
    return Conversation((*columns, tools), kept, tuple(learned), listed or None)


def _is_learned(turn: Message) -> bool:
    has_answer = bool(turn["content"].strip()) or "tool_calls" in turn
    return turn["role"] == ASSISTANT and has_answer and "weight" not in turn


def _is_asked(turns: list[Message]) -> bool:
    return any(turn["role"] == USER and turn["content"].strip() for turn in turns)


def _why_not(turns: list[Message]) -> str:
    if not any(turn["role"] == USER and turn["content"].strip() for turn in turns):
        return "no question"
    if not any(turn["role"] == ASSISTANT for turn in turns):
        return "no turn of the assistant"
    return "no answer"
