"""Rows to token ids, with labels on the answer alone."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fedllm.config import DataConfig
from fedllm.data.prompts import (
    common_prefix_length,
    encode,
    to_prompt_completion,
    training_texts,
)
from fedllm.data.readers import Row
from fedllm.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase


Example = dict[str, list[int]]
"""One row for the model: `input_ids` and `labels`."""


@dataclass(frozen=True)
class Tokenized:
    """Rows as labelled tokens, and counts of what was cut or left out."""

    examples: list[Example]
    """Each with `input_ids` and, of the same length, `labels`: the token id in the answer,
    else -100. At most max_length tokens, at least one of them of the answer."""
    num_truncated: int
    """Examples whose end the length limit cut."""
    num_without_answer: int
    """Rows left out: the question or the answer is missing or blank, or the length
    limit cut the whole answer."""


def tokenize(
    rows: "Dataset",
    tokenizer: "PreTrainedTokenizerBase",
    config: DataConfig,
    max_length: int,
) -> Tokenized:
    """Turn rows into tokens as TRL's SFTTrainer does, and label the answer.

    With a chat template: the conversation as the template renders it; the answer begins at
    the first token that differs from the prompt rendered alone (TRL 1.16,
    `SFTTrainer._prepare_dataset`). Without one: an Alpaca-style text, with the end token
    after the answer. An example longer than max_length loses its end.

    Args:
        rows: Rows with the columns that config names, or with `messages`.
        tokenizer: The base model's tokenizer.
        config: Names the columns.
        max_length: Longest example in tokens.

    Raises:
        DataError: A row is malformed, or the chat template rejects it.
    """
    examples: list[Example] = []
    num_truncated = num_without_answer = 0
    texts: list[tuple[str, str]] = []
    for number, row in enumerate(_each(rows), start=1):
        try:
            conversation = to_prompt_completion(config, row)
            if conversation is None:
                num_without_answer += 1
                continue
            texts.append(training_texts(tokenizer, *conversation))
        except DataError as error:
            raise DataError(f"row {number}: {error}") from None
    for prompt_ids, ids in encoded_pairs(tokenizer, texts):
        example = labelled(prompt_ids, ids, max_length)
        if example is None:
            num_without_answer += 1
            continue
        num_truncated += len(ids) > max_length
        examples.append(example)
    return Tokenized(examples, num_truncated, num_without_answer)


def encoded_pairs(
    tokenizer: "PreTrainedTokenizerBase", pairs: Sequence[tuple[str, str]]
) -> list[tuple[list[int], list[int]]]:
    """Return the tokens of questions and whole conversations, all at once."""
    encoded = iter(encode(tokenizer, [text for pair in pairs for text in pair]))
    return list(zip(encoded, encoded, strict=True))


def labelled(prompt_ids: list[int], ids: list[int], max_length: int) -> Example | None:
    """Return an example with labels on its answer; None if no token of it is left.

    Args:
        prompt_ids: Tokens of the conversation up to the answer.
        ids: Tokens of all of it.
        max_length: What is longer loses its end.
    """
    start = common_prefix_length(prompt_ids, ids)
    if start >= min(len(ids), max_length):
        return None
    ids = ids[:max_length]
    return {"input_ids": ids, "labels": [-100] * start + ids[start:]}


def _each(rows: "Dataset") -> Iterator[Row]:
    """Yield rows one by one, read by the thousand, since `datasets` is slow by single rows."""
    for columns in rows.iter(batch_size=1000):
        for cells in zip(*columns.values(), strict=True):
            yield dict(zip(columns, cells, strict=True))
