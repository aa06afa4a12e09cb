"""Loss of the answer's tokens, computed in chunks of the vocabulary's logits."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from fedllm.models.limits import require_known_tokens

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

_TOKENS_PER_CHUNK = 128


def answer_losses(
    model: "PreTrainedModel | PeftModel",
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    labels: torch.Tensor,
) -> torch.Tensor:
    """Return the negative log-likelihood of each answer token.

    The output head runs on the answer's positions only: with a vocabulary of 49,152
    scoring every position is a large part of a training step. It runs in chunks of
    positions, so that the logits of a frozen head never exist whole. A model whose scores
    are more than the head's product (a cap, a scale) computes them itself.

    Args:
        model: A causal language model, with or without a PEFT adapter.
        input_ids: (batch, length) token ids, padded on the right.
        attention_mask: (batch, length), 0 on padding.
        labels: (batch, length), the token id, or -100 for a token without a loss.

    Returns:
        (answer tokens in the batch,) float32 losses in nats.

    Raises:
        ModelError: The model has no embedding for a token, or transformers' own forward
            fails on it.
    """
    # Here, since a server that evaluates nothing must not import transformers.
    from fedllm.models.fast_paths import fast_paths
    from fedllm.models.packing import hidden_states

    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model
    # A token is scored by the state before it; a row's last state scores nothing.
    following = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    require_known_tokens(base, input_ids)
    paths = fast_paths(base)
    if not paths.head:
        scores = base(
            input_ids=input_ids, attention_mask=attention_mask, use_cache=False
        ).logits
        chosen = following != -100
        return torch.nn.functional.cross_entropy(
            scores[chosen].float(), following[chosen], reduction="none"
        )
    hidden = hidden_states(base, input_ids, attention_mask, paths.packing)
    targets = following[attention_mask.bool()]
    chosen = targets != -100
    head = base.get_output_embeddings()
    rows, targets = hidden[chosen], targets[chosen]
    trained = any(parameter.requires_grad for parameter in head.parameters())
    if trained and torch.is_grad_enabled():
        return torch.nn.functional.cross_entropy(
            head(rows).float(), targets, reduction="none"
        )
    losses: torch.Tensor = _ChunkedLosses.apply(  # type: ignore[no-untyped-call] # torch
        rows, targets, head
    )
    return losses


class _ChunkedLosses(torch.autograd.Function):
    """Losses of a frozen head, whose logits live for one chunk of positions at a time.

    A position's loss depends on its own row alone. The forward pass therefore keeps each
    loss's gradient with respect to its row, and the backward pass only scales it: the
    head is not run twice.
    """

    @staticmethod
    def forward(
        ctx: Any, rows: torch.Tensor, targets: torch.Tensor, head: Any
    ) -> torch.Tensor:
        needed = ctx.needs_input_grad[0]
        losses = torch.empty(len(rows), device=rows.device)
        gradients = torch.empty_like(rows) if needed else None
        for start in range(0, len(rows), _TOKENS_PER_CHUNK):
            part = slice(start, start + _TOKENS_PER_CHUNK)
            with torch.set_grad_enabled(needed):
                chunk = rows[part].detach().requires_grad_(needed)
                logits = head(chunk)
            scores = logits.detach().float().log_softmax(-1)
            answers = targets[part, None]
            losses[part] = -scores.gather(1, answers)[:, 0]
            if gradients is not None:
                # The cross-entropy's gradient: the probabilities, less 1 at the target.
                back = scores.exp_().scatter_add_(
                    1, answers, torch.full_like(answers, -1, dtype=scores.dtype)
                )
                (gradients[part],) = torch.autograd.grad(
                    logits, chunk, back.to(logits.dtype)
                )
        ctx.save_for_backward(*[] if gradients is None else [gradients])
        return losses

    @staticmethod
    def backward(ctx: Any, scale: torch.Tensor) -> Any:
        (gradients,) = ctx.saved_tensors
        return gradients * scale[:, None].to(gradients.dtype), None, None


def collate(
    examples: Sequence[Mapping[str, Any]], pad_token_id: int
) -> dict[str, torch.Tensor]:
    """Pad tokenised examples on the right to the longest.

    The attention mask and labels of -100 mark padding. Its id does not, since a model's
    padding token may be its end of text.
    """
    length = max(len(example["input_ids"]) for example in examples)
    ids = torch.full((len(examples), length), pad_token_id)
    mask = torch.zeros((len(examples), length), dtype=torch.long)
    labels = torch.full((len(examples), length), -100)
    for row, example in enumerate(examples):
        size = len(example["input_ids"])
        ids[row, :size] = torch.tensor(example["input_ids"])
        mask[row, :size] = 1
        labels[row, :size] = torch.tensor(example["labels"])
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}
