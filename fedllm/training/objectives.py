"""Objectives: what `train.objective` may name, and all that differs between them.

An objective has a loss of each example. Here are its three uses: a trainer of TRL's, the
gradient of each example for DP-SGD, and the score of examples that nobody trains on.

    >>> sorted(OBJECTIVES)
    ['dpo', 'sft']
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fedllm.config import TrainConfig

if TYPE_CHECKING:
    from datasets import Dataset

    from fedllm.adapters.adapted_model import AdaptedModel
    from fedllm.training.per_example_gradients import PerExample

Examples = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class BatchScore:
    """The score of a batch that nobody trains on.

    Attributes:
        loss: Sum of the losses, in nats.
        count: What it is a sum over: answer tokens, or pairs.
        preferred: Pairs whose chosen answer has the higher implicit reward.
        likelier: Pairs whose chosen answer is the likelier one.
    """

    loss: float
    count: int
    preferred: int = 0
    likelier: int = 0


@dataclass(frozen=True)
class Objective:
    """What a training is after.

    Attributes:
        make_trainer: (model, examples, config, settings that TRL's trainers have in common,
            collator or None) -> a trainer of TRL's, with `fedllm.training.client_trainer`.
        make_gradients: (model, config) -> the gradients of single examples.
        score: (model, batch, padding token, config) -> its score; without gradients.
        has_pairs: Whether an example is a pair, of which one answer is preferred.
    """

    make_trainer: Callable[
        ["AdaptedModel", "Dataset", TrainConfig, dict[str, Any], Any], Any
    ]
    make_gradients: Callable[["AdaptedModel", TrainConfig], "PerExample"]
    score: Callable[[Any, Examples, int, TrainConfig], BatchScore]
    has_pairs: bool = False


def objective_of(config: TrainConfig) -> Objective:
    """Return the objective of a training."""
    return OBJECTIVES[config.objective]


# Imported where used: TRL takes seconds, and a server that only scores needs none of it.
def _sft_trainer(*arguments: Any) -> Any:
    from fedllm.training.sft import make_sft_trainer

    return make_sft_trainer(*arguments)


def _dpo_trainer(*arguments: Any) -> Any:
    from fedllm.training.dpo import make_dpo_trainer

    return make_dpo_trainer(*arguments)


def _answer_gradients(adapted: "AdaptedModel", config: TrainConfig) -> "PerExample":
    from fedllm.training.per_example_gradients import PerExample

    return PerExample(adapted.model, adapted.pad_token_id)


def _pair_gradients(adapted: "AdaptedModel", config: TrainConfig) -> "PerExample":
    from fedllm.training.per_pair_gradients import PerPair

    return PerPair(adapted.model, adapted.pad_token_id, config.dpo_beta)


def _answer_score(
    model: Any, batch: Examples, pad_token_id: int, config: TrainConfig
) -> BatchScore:
    from fedllm.models.answer_loss import answer_losses, collate

    device = next(model.parameters()).device
    inputs = {k: v.to(device) for k, v in collate(batch, pad_token_id).items()}
    losses = answer_losses(model, **inputs)
    return BatchScore(float(losses.double().sum()), losses.numel())


def _pair_score(
    model: Any, batch: Examples, pad_token_id: int, config: TrainConfig
) -> BatchScore:
    from fedllm.training.preference_loss import collate_pairs, pair_scores

    device = next(model.parameters()).device
    inputs = {k: v.to(device) for k, v in collate_pairs(batch, pad_token_id).items()}
    scores = pair_scores(model, inputs, config.dpo_beta)
    return BatchScore(
        float(scores.losses.double().sum()),
        len(batch),
        int((scores.margins > 0).sum()),
        int((scores.likelihood_margins > 0).sum()),
    )


OBJECTIVES: Mapping[str, Objective] = {
    "sft": Objective(_sft_trainer, _answer_gradients, _answer_score),
    "dpo": Objective(_dpo_trainer, _pair_gradients, _pair_score, has_pairs=True),
}
