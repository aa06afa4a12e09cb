"""Per-example gradients where an example is a pair of answers, of which one is preferred."""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from fedllm.adapters.peft_model import adapter_off
from fedllm.data.tokens import texts_of
from fedllm.training.per_example_gradients import PerExample
from fedllm.training.preference_loss import scores_of

if TYPE_CHECKING:
    from peft import PeftModel


class PerPair(PerExample):
    """Per-pair gradients of a model's trained parameters.

    Args:
        model: The base model with the adapter on it, in the mode of the training.
        pad_token_id: Any token id.
        beta: `train.dpo-beta`.

    Raises:
        ModelError: transformers' own forward fails on this model.
    """

    def __init__(self, model: "PeftModel", pad_token_id: int, beta: float) -> None:
        super().__init__(model, pad_token_id)
        self._beta = beta

    def gradients(
        self, examples: Sequence[Mapping[str, Any]], micro_batch_size: int
    ) -> Iterator[torch.Tensor]:
        """Yield every pair's gradient, one pair a pass.

        Args:
            examples: Pairs of tokens and labels; may be empty.
            micro_batch_size: Not used.

        Yields:
            (1, d) float32 on the CPU, values in the order of `trained`.

        Guarantee:
            A row is the gradient of the pair's own loss, whatever the other pairs are, bit
            for bit: model and reference see the two texts of one pair, one text at a time.
            A pair that the model cannot take has no row, and `num_unfit` counts it.
        """
        for pair in examples:
            if all(map(self._fits, texts_of(pair))):
                yield from self._alone(pair, 1, together=False)
            else:
                self.num_unfit += 1

    def _backward(self, batch: Sequence[Mapping[str, Any]]) -> None:
        """Run the backward pass of one pair's loss."""
        (pair,) = batch
        with torch.no_grad(), adapter_off(self._model):
            reference = self._difference(pair)
        scores = scores_of(self._difference(pair), reference, self._beta)
        torch.autograd.backward(scores.losses)

    def _difference(self, pair: Mapping[str, Any]) -> torch.Tensor:
        """Return log p(chosen) - log p(rejected)."""
        chosen, rejected = (self._log_probability(text) for text in texts_of(pair))
        return chosen - rejected

    def _log_probability(self, text: Mapping[str, Any]) -> torch.Tensor:
        """Return the log-probability of a text's answers. Nothing is padded or masked."""
        ids = torch.tensor([text["input_ids"]], device=self._device)
        targets = torch.tensor(text["labels"], device=self._device)[1:]
        chosen = targets != -100
        base: Any = self._model.get_base_model()
        if self._has_plain_head:
            states = base.base_model(input_ids=ids, use_cache=False).last_hidden_state
            scores = base.get_output_embeddings()(states[0, :-1][chosen])
        else:
            scores = base(input_ids=ids, use_cache=False).logits[0, :-1][chosen]
        return -torch.nn.functional.cross_entropy(
            scores.float(), targets[chosen], reduction="sum"
        )
