"""Forward and backward passes of a small model, to compare two of them."""

from typing import Any

import torch

IDS = torch.arange(3, 35).reshape(2, 16)


def _logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=IDS).logits
    return logits


def _gradient(model: Any) -> torch.Tensor:
    """Of the loss, through every layer, with respect to the embedded tokens."""
    embedded = model.get_input_embeddings()(IDS).detach().requires_grad_()
    model(inputs_embeds=embedded, labels=IDS).loss.backward()
    assert embedded.grad is not None
    return embedded.grad.float()


def _relative_error(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((got - wanted).norm() / wanted.norm())
