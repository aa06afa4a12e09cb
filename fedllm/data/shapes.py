r"""Shapes of rows: what a row is, by its own columns, as a conversation or as plain text.

>>> row = {"instruction": "Translate.", "input": "Die Katze.", "output": "The cat."}
>>> [turn["content"] for turn in read_row(DataConfig(), row).turns]
['Translate.\n\nDie Katze.', 'The cat.']
"""

from dataclasses import dataclass
from typing import Any

from fedllm.config import DataConfig
from fedllm.data.columns import (
    MESSAGES,
    PREFERENCES,
    TOOLS,
    UNREADABLE,
    Row,
    answer_columns,
    first_of,
    input_columns,
    question_columns,
    restored,
    system_columns,
)
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


@dataclass(frozen=True)
class PlainText:
    """Text of which every token is learned.

    Attributes:
        columns: The column that it is in.
        text: Not blank.
    """

    columns: tuple[str, ...]
    text: str


class NoShapeError(UnusableRowError):
    """A row has none of the columns that make a shape."""


def read_row(config: DataConfig, row: Row) -> Conversation | PlainText:
    """Return what can be learned from a row. It goes by this row alone.

    Args:
        config: Names columns, or the shape.
        row: Cells by the names that `used_part` gives.

    Raises:
        UnusableRowError: Nothing can; the reason.
    """
    row = restored(row)
    if row.get(UNREADABLE) is not None:
        raise UnusableRowError(str(row[UNREADABLE]))
    if config.format in ("auto", "messages"):
        for column in MESSAGES:
            value = row.get(column)
            if value is not None and (column == MESSAGES[0] or _may_be_turns(value)):
                return _from_turns(config, row, column)
    question = first_of(row, question_columns(config))
    answer = first_of(row, answer_columns(config))
    has_pair = question is not None or answer is not None
    if config.format == "question-answer" or (config.format == "auto" and has_pair):
        return _from_pair(config, row, question, answer)
    text = row.get(config.text_column)
    if config.format in ("auto", "text") and text is not None:
        text = read_text(text, f"column {config.text_column!r}")
        if not text.strip():
            raise UnusableRowError("no text")
        return PlainText((config.text_column,), text)
    if first_of(row, PREFERENCES) is not None:
        raise UnusableRowError(
            "a preference (chosen, rejected): there is no answer to learn"
        )
    raise NoShapeError("no column that is used has a value")


def _may_be_turns(value: object) -> bool:
    """Return whether a cell is turns, well-formed or not, and not text of another kind."""
    return isinstance(value, list) or holds_turns(value)


def _from_turns(config: DataConfig, row: Row, column: str) -> Conversation:
    turns = read_turns(row[column], column)
    return _conversation(config, row, [], turns, (column,))


def _from_pair(
    config: DataConfig, row: Row, question: str | None, answer: str | None
) -> Conversation:
    if question is None:
        raise UnusableRowError("no question")
    if answer is None:
        if first_of(row, PREFERENCES) is not None:
            raise UnusableRowError(
                "a preference (chosen, rejected): there is no answer to learn"
            )
        raise UnusableRowError("no answer")
    columns: tuple[str, ...] = (question, answer)
    if _may_be_turns(row[question]):
        prompt = read_turns(row[question], question)
    else:
        text = read_text(row[question], f"column {question!r}")
        rest = (name for name in input_columns(config) if name not in columns)
        more = first_of(row, rest)
        if more is not None:
            columns = (question, more, answer)
            added = read_text(row[more], f"column {more!r}")
            text = "\n\n".join(part for part in (text, added) if part.strip())
        prompt = [turn_of(USER, text)]
    if isinstance(row[answer], dict | list) or holds_turns(row[answer]):
        completion = read_turns(row[answer], answer)
    else:
        completion = [turn_of(ASSISTANT, read_text(row[answer], f"column {answer!r}"))]
    return _conversation(config, row, prompt, completion, columns)


def _conversation(
    config: DataConfig,
    row: Row,
    before: list[Message],
    turns: list[Message],
    columns: tuple[str, ...],
) -> Conversation:
    """Return a conversation of which the assistant's turns after `before` are learned.

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
