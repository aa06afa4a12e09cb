r"""Shapes of rows: what a row is, by its own columns, as a conversation or as plain text.

>>> row = {"instruction": "Translate.", "input": "Die Katze.", "output": "The cat."}
>>> [turn["content"] for turn in read_row(DataConfig(), row).turns]
['Translate.\n\nDie Katze.', 'The cat.']
"""

from dataclasses import dataclass

from fedllm.config import DataConfig
from fedllm.data.columns import (
    MESSAGES,
    PREFERENCES,
    UNREADABLE,
    Row,
    answer_columns,
    first_of,
    question_columns,
    restored,
)
from fedllm.data.conversations import (
    Conversation,
    conversation_of,
    may_be_turns,
    read_answer,
    read_question,
)
from fedllm.data.preferences import Preference, read_preference
from fedllm.data.turns import UnusableRowError, read_text, read_turns


@dataclass(frozen=True)
class PlainText:
    """Text of which every token is learned.

    Attributes:
        columns: The column that it is in.
        text: Not blank.
    """

    columns: tuple[str, ...]
    text: str


Content = Conversation | PlainText | Preference
"""What can be learned from a row."""


class NoShapeError(UnusableRowError):
    """A row has none of the columns that make a shape."""


def read_row(config: DataConfig, row: Row) -> Content:
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
    if config.format == "preference":
        return read_preference(config, row)
    if config.format in ("auto", "messages"):
        for column in MESSAGES:
            value = row.get(column)
            if value is not None and (column == MESSAGES[0] or may_be_turns(value)):
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


def _from_turns(config: DataConfig, row: Row, column: str) -> Conversation:
    turns = read_turns(row[column], column)
    return conversation_of(config, row, [], turns, (column,))


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
    columns, prompt = read_question(config, row, question, (answer,))
    return conversation_of(
        config, row, prompt, read_answer(row, answer), (*columns, answer)
    )
