r"""Preferences: rows of a prompt and two answers, of which one was chosen.

The prompt is a column, or the beginning that both share, as TRL's implicit prompts are:

>>> from fedllm.config import DataConfig
>>> user = {"role": "user", "content": "Is it cold?"}
>>> row = {
...     "chosen": [user, {"role": "assistant", "content": "Yes."}],
...     "rejected": [user, {"role": "assistant", "content": "Perhaps."}],
... }
>>> read_preference(DataConfig(), row).rejected.turns[-1]["content"]
'Perhaps.'
"""

import re
from dataclasses import dataclass

from fedllm.config import DataConfig
from fedllm.data.columns import PREFERENCES, Row, first_of, question_columns
from fedllm.data.conversations import (
    Conversation,
    conversation_of,
    may_be_turns,
    read_answer,
    read_question,
)
from fedllm.data.prompts import common_prefix_length
from fedllm.data.turns import (
    ASSISTANT,
    USER,
    Message,
    UnusableRowError,
    read_text,
    turn_of,
)

# Anthropic's transcripts, which hold a conversation as one text.
_SPEAKER = re.compile(r"(?:^|\n\n)(Human|Assistant):[ \n]?")
_ROLES = {"Human": USER, "Assistant": ASSISTANT}


@dataclass(frozen=True)
class Preference:
    """Two conversations that begin alike, of which one is preferred.

    Attributes:
        columns: The columns that they are made of.
        chosen: The preferred one.
        rejected: The other. In both all is learned that the assistant says after the
            common beginning.
    """

    columns: tuple[str, ...]
    chosen: Conversation
    rejected: Conversation

    @property
    def turns(self) -> list[Message]:
        """The turns of the preferred conversation."""
        return self.chosen.turns


def read_preference(config: DataConfig, row: Row) -> Preference:
    """Return the two conversations of a row. It goes by this row alone.

    Args:
        config: Names columns.
        row: Cells by the names that `used_part` gives, with lists and objects as they were.

    Raises:
        UnusableRowError: There are none to compare; the reason.
    """
    missing = [name for name in PREFERENCES if row.get(name) is None]
    if missing:
        raise UnusableRowError(f"no {' and no '.join(missing)} answer")
    sides = [_turns(row, name) for name in PREFERENCES]
    if sides[0] == sides[1]:
        raise UnusableRowError("chosen and rejected are the same")
    columns, before, sides = _parts(config, row, sides)
    chosen, rejected = (
        _side(config, row, before, turns, name, columns)
        for name, turns in zip(PREFERENCES, sides, strict=True)
    )
    named = tuple(dict.fromkeys((*columns, *PREFERENCES, *chosen.columns)))
    return Preference(named, chosen, rejected)


def _side(
    config: DataConfig,
    row: Row,
    before: list[Message],
    turns: list[Message],
    name: str,
    columns: tuple[str, ...],
) -> Conversation:
    try:
        return conversation_of(config, row, before, turns, (*columns, name))
    except UnusableRowError as error:
        raise UnusableRowError(f"{name}: {error}") from None


def _parts(
    config: DataConfig, row: Row, sides: list[list[Message]]
) -> tuple[tuple[str, ...], list[Message], list[list[Message]]]:
    """Return the columns of the prompt, its turns, and the turns after it of each answer."""
    shared = common_prefix_length(*sides)
    if any(turn["role"] == USER for turn in sides[0][:shared]):
        # A column with the prompt says it once more.
        return (), sides[0][:shared], [turns[shared:] for turns in sides]
    question = first_of(row, question_columns(config))
    if question is not None:
        columns, before = read_question(config, row, question, PREFERENCES)
        return columns, before, sides
    if any(may_be_turns(row[name]) for name in PREFERENCES):
        raise UnusableRowError("no prompt, and chosen and rejected do not begin alike")
    return (), *_split_texts([read_text(row[n], f"column {n!r}") for n in PREFERENCES])


def _turns(row: Row, name: str) -> list[Message]:
    """Return the turns of an answer: a list, a transcript, or one turn of the assistant."""
    cell = row[name]
    if not isinstance(cell, str) or may_be_turns(cell):
        return read_answer(row, name)
    text = read_text(cell, f"column {name!r}")
    pieces = _SPEAKER.split(text)
    if pieces[0].strip() or len(pieces) < 5 or pieces[1] != "Human":
        return [turn_of(ASSISTANT, text)]
    speakers = zip(pieces[1::2], pieces[2::2], strict=True)
    return [turn_of(_ROLES[who], said.strip()) for who, said in speakers]


def _split_texts(texts: list[str]) -> tuple[list[Message], list[list[Message]]]:
    """Return the common beginning of texts as a question, and their ends as answers.

    It ends between words, so that no answer begins within one.

    Raises:
        UnusableRowError: They do not begin alike.
    """
    shared = texts[0][: common_prefix_length(*texts)]
    while shared and not shared[-1].isspace():
        shared = shared[:-1]
    if not shared.strip():
        raise UnusableRowError("no prompt, and chosen and rejected do not begin alike")
    ends = [[turn_of(ASSISTANT, text[len(shared) :])] for text in texts]
    return [turn_of(USER, shared.rstrip())], ends
