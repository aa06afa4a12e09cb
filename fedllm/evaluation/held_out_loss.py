"""The loss of a model on rows that it did not train on."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from fedllm.config import TrainConfig
from fedllm.data.tokens import texts_of
from fedllm.errors import DataError
from fedllm.training.objectives import objective_of

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

_TOKENS_PER_BATCH = 2048


@dataclass(frozen=True)
class HeldOut:
    """Held-out loss, in nats.

    Attributes:
        loss: Mean negative log-likelihood of an answer token; of pairs their mean loss.
        num_examples: Examples.
        num_tokens: Tokens of their answers.
        preferred: Share of the pairs whose chosen answer has the higher implicit reward; None
            for answers. Of the base, whose rewards are all 0, it is 0.
        likelier: Share of the pairs whose chosen answer is the likelier one; None for answers.
    """

    loss: float
    num_examples: int
    num_tokens: int
    preferred: float | None = None
    likelier: float | None = None

    @property
    def perplexity(self) -> float:
        """exp(loss); inf if that overflows."""
        return math.exp(self.loss) if self.loss < 700 else math.inf


def held_out(
    model: "PreTrainedModel | PeftModel",
    examples: Sequence[Mapping[str, Any]],
    pad_token_id: int,
    config: TrainConfig | None = None,
) -> HeldOut:
    """Measure the loss of the training's objective on tokenised, labelled examples.

    Args:
        model: The model; left in eval mode.
        examples: As the objective trains on them.
        pad_token_id: Any token id.
        config: Gives the objective; None: the answers' own loss.

    Raises:
        DataError: There is no answer token to score.
    """
    model.eval()
    config = config or TrainConfig()
    objective = objective_of(config)
    with torch.inference_mode():
        scores = [
            objective.score(model, batch, pad_token_id, config)
            for batch in _batches(examples)
        ]
    count = sum(score.count for score in scores)
    if count == 0:
        raise DataError("there is no answer token to score: every row is empty")
    loss = sum(score.loss for score in scores) / count
    texts = [text for example in examples for text in texts_of(example)]
    tokens = sum(label >= 0 for text in texts for label in text["labels"][1:])
    if not objective.has_pairs:
        return HeldOut(loss, len(examples), tokens)
    preferred = sum(score.preferred for score in scores) / count
    likelier = sum(score.likelier for score in scores) / count
    return HeldOut(loss, len(examples), tokens, preferred, likelier)


def _batches(
    examples: Sequence[Mapping[str, Any]],
) -> Iterator[list[Mapping[str, Any]]]:
    """Yield batches of similar length, so that little of a batch is padding."""
    batch: list[Mapping[str, Any]] = []
    for example in sorted(examples, key=_length):
        if batch and _length(example) * (len(batch) + 1) > _TOKENS_PER_BATCH:
            yield batch
            batch = []
        batch.append(example)
    if batch:
        yield batch


def _length(example: Mapping[str, Any]) -> int:
    """Return the tokens that an example takes of a batch."""
    texts = texts_of(example)
    return len(texts) * max(len(text["input_ids"]) for text in texts)
