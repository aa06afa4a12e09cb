"""Accuracy on multiple-choice questions."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fedllm.evaluation.question_files import read_questions
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
    form = (
        "question (text), options (at least two texts) and answer (index of the right "
        "option, from 0)"
    )
    return read_questions(path, _is_question, form)


def _is_question(row: Any) -> bool:
    question, options, answer = row["question"], row["options"], row["answer"]
    return (
        isinstance(question, str)
        and isinstance(options, list)
        and all(isinstance(option, str) and option for option in options)
        and type(answer) is int
        and len(options) >= 2
        and 0 <= answer < len(options)
    )


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
    correct, correct_per_byte, chance = 0, 0, 0.0
    for row in questions:
        prompt, options = prompt_of(row["question"]), row["options"]
        losses = _option_losses(model, tokenizer, prompt, options)
        per_token = [sum(option) / len(option) for option in losses]
        per_byte = [
            sum(option) / len(text.encode("utf-8"))
            for option, text in zip(losses, options, strict=True)
        ]
        correct += per_token.index(min(per_token)) == row["answer"]
        correct_per_byte += per_byte.index(min(per_byte)) == row["answer"]
        chance += 1 / len(options)
    n = len(questions)
    interval = _wilson(correct, n)
    return MultipleChoice(correct / n, correct_per_byte / n, n, chance / n, interval)


def _option_losses(
    model: "PreTrainedModel | PeftModel",
    tokenizer: "PreTrainedTokenizerBase",
    prompt: str,
    options: Sequence[str],
) -> list[list[float]]:
    """Return for each option the loss of each of its tokens, in nats."""
    prompt_ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    answers = [tokenizer(o, add_special_tokens=False)["input_ids"] for o in options]
    examples = [
        {"input_ids": prompt_ids + ids, "labels": [-100] * len(prompt_ids) + ids}
        for ids in answers
    ]
    batch = collate(examples, tokenizer.pad_token_id or 0)
    device = next(model.parameters()).device
    with torch.inference_mode():
        losses = answer_losses(model, **{k: v.to(device) for k, v in batch.items()})
    rest = iter(losses.tolist())
    return [list(islice(rest, len(ids))) for ids in answers]


def _wilson(correct: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """Return the 95 % Wilson score interval of a share."""
    share = correct / n
    middle = share + z * z / (2 * n)
    spread = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return (middle - spread) / scale, (middle + spread) / scale
