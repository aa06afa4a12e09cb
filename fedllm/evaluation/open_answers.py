"""Open answers held against references, and questions of general knowledge."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from fedllm.errors import DataError


@dataclass(frozen=True)
class OpenScore:
    """Means over questions, each from 0 to 1."""

    exact_match: float
    rouge_l: float
    num_questions: int


def off_topic_rows() -> list[dict[str, str]]:
    """Return the embedded questions and answers, of no medical subject."""
    text = files("fedllm.data").joinpath("off_topic.jsonl").read_text("utf-8")
    return [json.loads(line) for line in text.splitlines()]


def load_open_questions(path: Path) -> list[dict[str, str]]:
    """Read JSONL with question and answer, both text.

    Raises:
        DataError: Names the first line that is not of that form.
    """
    try:
        lines = path.read_text("utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from None
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            fine = all(
                isinstance(row[name], str) and row[name].strip()
                for name in ("question", "answer")
            )
        except (ValueError, KeyError, TypeError):
            fine = False
        if not fine:
            raise DataError(f"{path}:{number}: needs question and answer, both text")
        rows.append(row)
    if not rows:
        raise DataError(f"{path}: has no question")
    return rows


def score_answers(answers: Sequence[str], references: Sequence[str]) -> OpenScore:
    """Hold answers against one reference each.

    Args:
        answers: At least one answer.
        references: As many references.
    """
    pairs = [(_words(a), _words(r)) for a, r in zip(answers, references, strict=True)]
    exact = sum(answer == reference for answer, reference in pairs)
    overlap = sum(rouge_l(answer, reference) for answer, reference in pairs)
    return OpenScore(exact / len(pairs), overlap / len(pairs), len(pairs))


def rouge_l(answer: Sequence[str], reference: Sequence[str]) -> float:
    """Return the F1 of the longest common subsequence (Lin, 2004, with beta 1).

    Args:
        answer: Words of the answer.
        reference: Words of the reference.
    """
    common = _common_length(answer, reference)
    return 2 * common / (len(answer) + len(reference)) if common else 0.0


def _common_length(one: Sequence[str], other: Sequence[str]) -> int:
    """Return the length of the longest common subsequence."""
    row = [0] * (len(other) + 1)
    for word in one:
        before = row
        row = [0]
        for column, other_word in enumerate(other):
            if word == other_word:
                row.append(before[column] + 1)
            else:
                row.append(max(row[-1], before[column + 1]))
    return row[-1]


def _words(text: str) -> list[str]:
    """Return words in small letters, without punctuation; of any script."""
    return re.findall(r"\w+", text.casefold())
