"""Accuracy on multiple-choice questions."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fedllm.errors import DataError
from fedllm.models.answer_loss import answer_losses, collate

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class MultipleChoice:
    """Share of questions whose right option has the highest mean log-probability."""

    accuracy: float
    """With the mean over the tokens of an option."""
    accuracy_per_byte: float
    """With the mean over the bytes of its UTF-8 text: lm-evaluation-harness's acc_bytes."""
    num_questions: int
    chance: float
    interval: tuple[float, float]
    """95 % Wilson interval of the accuracy."""


def load_questions(path: Path) -> list[dict[str, Any]]:
    """Read a multiple-choice file: JSONL with question, options and answer (an index).

    Raises:
        DataError: Names the first line that is not of that form.
    """
    try:
        lines = path.read_text("utf-8").split("\n")
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: is not UTF-8 text: {error.reason}") from None
    questions = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            question, options, answer = row["question"], row["options"], row["answer"]
            fine = isinstance(question, str) and type(answer) is int
            fine = fine and isinstance(options, list)
            fine = fine and all(
                isinstance(option, str) and option for option in options
            )
            fine = fine and len(options) >= 2 and 0 <= answer < len(options)
        except (ValueError, KeyError, TypeError):
            fine = False
        if not fine:
            raise DataError(
                f"{path}:{number}: needs question (text), options (at least two texts) "
                "and answer (index of the right option, from 0)"
            )
        questions.append(row)
    if not questions:
        raise DataError(f"{path}: has no question")
    return questions


def multiple_choice(
    model: "PreTrainedModel | PeftModel",
    tokenizer: "PreTrainedTokenizerBase",
    questions: Sequence[Mapping[str, Any]],
    prompt_of: Any,
) -> MultipleChoice:
    """Score each option by its mean log-probability after the question.

    Args:
        model: The model; left in eval mode.
        tokenizer: Its tokenizer.
        questions: Rows of `load_questions`.
        prompt_of: Question -> the whole prompt, template included.
    """
    model.eval()
    device = next(model.parameters()).device
    pad = tokenizer.pad_token_id or 0
    right, right_per_byte, chance = 0, 0, 0.0
    for row in questions:
        prompt = tokenizer(prompt_of(row["question"]), add_special_tokens=False)[
            "input_ids"
        ]
        examples = []
        for option in row["options"]:
            answer = tokenizer(option, add_special_tokens=False)["input_ids"]
            labels = [-100] * len(prompt) + answer
            examples.append({"input_ids": prompt + answer, "labels": labels})
        with torch.inference_mode():
            inputs = {k: v.to(device) for k, v in collate(examples, pad).items()}
            losses = answer_losses(model, **inputs).tolist()
        per_token, per_byte, start = [], [], 0
        for option, example in zip(row["options"], examples, strict=True):
            size = len(example["input_ids"]) - len(prompt)
            total = sum(losses[start : start + size])
            per_token.append(total / size)
            per_byte.append(total / len(option.encode("utf-8")))
            start += size
        right += per_token.index(min(per_token)) == row["answer"]
        right_per_byte += per_byte.index(min(per_byte)) == row["answer"]
        chance += 1 / len(row["options"])
    n = len(questions)
    interval = _wilson(right, n)
    return MultipleChoice(right / n, right_per_byte / n, n, chance / n, interval)


def _wilson(right: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """Return the 95 % Wilson score interval of a share."""
    share = right / n
    middle = share + z * z / (2 * n)
    spread = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return (middle - spread) / scale, (middle + spread) / scale
