"""Direct preference optimisation of an adapter on one client's pairs, by TRL's trainer."""

from contextlib import nullcontext
from typing import Any

from datasets import Dataset
from trl import DPOConfig, DPOTrainer

from fedllm.adapters.adapted_model import AdaptedModel
from fedllm.config import TrainConfig
from fedllm.training.activation_compression import compressed_activations
from fedllm.training.client_trainer import ClientTrainer
from fedllm.training.preference_loss import collate_pairs, pair_scores


class PreferenceTrainer(ClientTrainer, DPOTrainer):  # type: ignore[misc] # TRL has no types
    """TRL's trainer, whose reference is the base and whose loss scores the answers alone.

    The loss is that of DPOTrainer (a test compares the adapters). DPOTrainer would take a
    copy of the adapter as it begins, the round's, as the reference; ours is the base in every
    round, so that rounds add up. It also computes entropies and accuracies besides.
    """

    def __init__(
        self, *args: Any, model: Any, compress: bool = False, **kwargs: Any
    ) -> None:
        # A reference that is named keeps TRL from copying the adapter. It is not used.
        super().__init__(*args, model=model, ref_model=model.get_base_model(), **kwargs)
        self.ref_model = None
        # Else a step of several micro-batches would be their sum: the trainer takes labels,
        # which a batch of ours has, for a loss that is summed over tokens.
        self.model_accepts_loss_kwargs = False
        self._compress = compress

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        """Return the pairs as they are: they are tokens already."""
        return dataset

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Return the mean loss of the pairs, plus FedProx's pull."""
        with compressed_activations(model) if self._compress else nullcontext():
            scores = pair_scores(model, inputs, self.beta)
        # The trainer divides by the micro-batches of a step.
        return scores.losses.mean() + self.pull()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Append to the history; DPOTrainer would add what is not computed."""
        self.state.log_history.append(logs)


def make_dpo_trainer(
    adapted: AdaptedModel,
    pairs: Dataset,
    config: TrainConfig,
    settings: dict[str, Any],
    collator: Any,
) -> PreferenceTrainer:
    """Return the trainer of one client's pairs.

    Args:
        adapted: The resident model.
        pairs: Its pairs as tokens.
        config: Gives beta.
        settings: What TRL's trainers have in common.
        collator: Makes a batch; None: the usual one.
    """
    own = {"beta": config.dpo_beta, "disable_dropout": False}
    return PreferenceTrainer(
        model=adapted.model,
        args=DPOConfig(**settings, **own),
        train_dataset=pairs,
        processing_class=adapted.tokenizer,
        data_collator=collator
        or (lambda rows: collate_pairs(rows, adapted.pad_token_id)),
        proximal_mu=config.proximal_mu,
        compress=config.activation_compression,
    )
