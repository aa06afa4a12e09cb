"""The loss of direct preference optimisation (Rafailov et al. 2023, arXiv 2305.18290).

With r = log p(chosen) - log p(rejected) under the tuned model and s the same under the base,
the loss of a pair is -log sigmoid(beta * (r - s)): log 2 for the base itself. beta * (r - s)
is the difference of the two answers' implicit rewards.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from fedllm.adapters.peft_model import adapter_off
from fedllm.data.tokens import texts_of
from fedllm.models.answer_loss import answer_losses, collate

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class PairScores:
    """What a model makes of pairs, one value a pair.

    Attributes:
        losses: In nats a pair.
        margins: Difference of the implicit rewards; 0 for the base.
        likelihood_margins: Difference of the log-probabilities under the model alone.
    """

    losses: torch.Tensor
    margins: torch.Tensor
    likelihood_margins: torch.Tensor


def pair_scores(
    model: "PreTrainedModel | PeftModel",
    inputs: Mapping[str, torch.Tensor],
    beta: float,
) -> PairScores:
    """Return the loss of each pair of a batch, and what it is made of.

    Args:
        model: A causal language model. Without an adapter, or with it off, it is its own
            reference.
        inputs: As `collate_pairs` returns them.
        beta: `train.dpo-beta`.

    Raises:
        ModelError: The model has no embedding for a token, or transformers' own forward
            fails on it.
    """
    # First, since switching the adapter off and on again touches what requires a gradient.
    with torch.no_grad(), adapter_off(model):
        reference = _differences(model, inputs)
    difference = _differences(model, inputs)
    return scores_of(difference, reference, beta)


def scores_of(
    difference: torch.Tensor, reference: torch.Tensor, beta: float
) -> PairScores:
    """Return the loss of pairs.

    Args:
        difference: log p(chosen) - log p(rejected) under the model, (pairs,).
        reference: The same under the base.
        beta: `train.dpo-beta`.
    """
    margins = beta * (difference - reference)
    losses = -torch.nn.functional.logsigmoid(margins)
    return PairScores(losses, margins.detach(), difference.detach())


def collate_pairs(
    pairs: Sequence[Mapping[str, Any]], pad_token_id: int
) -> dict[str, torch.Tensor]:
    """Pad pairs on the right: all chosen texts, then all rejected ones, (2 * pairs, length)."""
    sides = zip(*map(texts_of, pairs), strict=True)
    return collate([text for side in sides for text in side], pad_token_id)


def _differences(
    model: "PreTrainedModel | PeftModel", inputs: Mapping[str, torch.Tensor]
) -> torch.Tensor:
    """Return log p(chosen) - log p(rejected) of each pair, (pairs,) float32."""
    losses = answer_losses(
        model, inputs["input_ids"], inputs["attention_mask"], inputs["labels"]
    )
    counts = (inputs["labels"][:, 1:] != -100).sum(1).tolist()
    sums = torch.stack([-part.sum() for part in torch.split(losses, counts)])
    chosen, rejected = sums.chunk(2)
    return chosen - rejected
