"""Scores of open answers against references, and questions of general knowledge."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from fedllm.evaluation.question_files import read_questions


@dataclass(frozen=True)
class OpenScore:
    """Means over questions, each from 0 to 1."""

    exact_match: float
    rouge_l: float
    num_questions: int


def off_topic_rows() -> list[dict[str, str]]:
    """Return the embedded questions and answers on subjects other than medicine."""
    text = files("fedllm.data").joinpath("off_topic.jsonl").read_text("utf-8")
    return [json.loads(line) for line in text.splitlines()]


def load_open_questions(path: Path) -> list[dict[str, str]]:
    """Read a JSONL file with question and answer, both text.

    Raises:
        DataError: Names the first line that is not of that form.
    """
    return read_questions(path, _is_open_question, "question and answer, both text")


def _is_open_question(row: Any) -> bool:
    texts = row["question"], row["answer"]
    return all(isinstance(text, str) and bool(text.strip()) for text in texts)


def score_answers(answers: Sequence[str], references: Sequence[str]) -> OpenScore:
    """Score answers against one reference each.

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
    """Return the lowercased words of a text without punctuation, in any script."""
    return re.findall(r"\w+", text.casefold())
