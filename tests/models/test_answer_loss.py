"""The loss over answer tokens, its gradient, and padding."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from fedllm.models import answer_loss
from fedllm.models.answer_loss import answer_losses, collate
from tests.helpers.examples import make_examples


@pytest.fixture(scope="module")
def model(tiny_chat_llama: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_chat_llama, dtype=torch.float32)


def test_answer_losses_have_the_gradient_of_the_full_loss(model):
    inputs = collate(make_examples(4), 0)
    head = model.get_output_embeddings().weight
    gradients = []
    for loss in (
        answer_losses(model, **inputs).mean(),
        model(**inputs, use_cache=False).loss,
    ):
        gradients.append(torch.autograd.grad(loss, head)[0])

    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-6)


def test_a_frozen_head_sees_a_chunk_at_a_time_and_the_gradient_stays(
    model, monkeypatch
):
    monkeypatch.setattr(answer_loss, "_TOKENS_PER_CHUNK", 3)
    inputs = collate(make_examples(4), 0)
    head = model.get_output_embeddings()
    whole = answer_losses(model, **inputs)
    weights = torch.linspace(-1, 2, len(whole))
    layer = model.base_model.layers[0].mlp.up_proj.weight
    expected = torch.autograd.grad((whole * weights).sum(), layer)[0]
    seen: list[int] = []
    hook = head.register_forward_hook(lambda _, rows, __: seen.append(len(rows[0])))
    head.requires_grad_(False)
    try:
        chunked = answer_losses(model, **inputs)
        got = torch.autograd.grad((chunked * weights).sum(), layer)[0]
    finally:
        hook.remove()
        head.requires_grad_(True)

    assert max(seen) == 3
    assert sum(seen) == len(whole) > 3
    torch.testing.assert_close(chunked, whole)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)


def test_collating_pads_on_the_right():
    rows = [
        {"input_ids": [5, 6], "labels": [-100, 6]},
        {"input_ids": [7], "labels": [7]},
    ]

    got = collate(rows, 9)

    assert got["input_ids"].tolist() == [[5, 6], [7, 9]]
    assert got["attention_mask"].tolist() == [[1, 1], [1, 0]]
    assert got["labels"].tolist() == [[-100, 6], [7, -100]]
