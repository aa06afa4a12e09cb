"""The loss of a model on rows that it did not train on."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from fedllm.errors import DataError
from fedllm.models.answer_loss import answer_losses, collate

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

_TOKENS_PER_BATCH = 2048


@dataclass(frozen=True)
class HeldOut:
    """Held-out loss: mean negative log-likelihood per answer token, in nats."""

    loss: float
    num_examples: int
    num_tokens: int

    @property
    def perplexity(self) -> float:
        """exp(loss); inf if that overflows."""
        return math.exp(self.loss) if self.loss < 700 else math.inf


def held_out(
    model: "PreTrainedModel | PeftModel",
    examples: Sequence[Mapping[str, Any]],
    pad_token_id: int,
) -> HeldOut:
    """Measure the loss on tokenised, labelled examples.

    Args:
        model: The model; left in eval mode.
        examples: Rows with `input_ids` and `labels`.
        pad_token_id: Any token id.

    Raises:
        DataError: There is no answer token to score.
    """
    model.eval()
    device = next(model.parameters()).device
    total, tokens = 0.0, 0
    with torch.inference_mode():
        for batch in _batches(examples):
            inputs = {k: v.to(device) for k, v in collate(batch, pad_token_id).items()}
            losses = answer_losses(model, **inputs)
            total += float(losses.double().sum())
            tokens += losses.numel()
    if tokens == 0:
        raise DataError("there is no answer token to score: every row is empty")
    return HeldOut(total / tokens, len(examples), tokens)


def _batches(
    examples: Sequence[Mapping[str, Any]],
) -> Iterator[list[Mapping[str, Any]]]:
    """Yield batches of similar length, so that little of a batch is padding."""
    batch: list[Mapping[str, Any]] = []
    for example in sorted(examples, key=lambda row: len(row["input_ids"])):
        if batch and len(example["input_ids"]) * (len(batch) + 1) > _TOKENS_PER_BATCH:
            yield batch
            batch = []
        batch.append(example)
    if batch:
        yield batch
