"""Quantised embeddings and output heads."""

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from fedllm.errors import ModelError
from fedllm.models import quantized_embeddings
from fedllm.models.loading import load_base
from tests.helpers.passes import IDS, _logits


@pytest.mark.parametrize("quantization", [0, 4])
def test_embeddings_in_nf4_look_up_what_nf4_keeps(
    tiny_llama: Path, tmp_path: Path, quantization: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    plain = load_base(str(tiny_llama), quantization, tmp_path, "cpu")
    table = plain.get_input_embeddings().weight
    expected = dequantize_4bit(*quantize_4bit(table, quant_type="nf4"))
    # Parts that do not divide the vocabulary.
    monkeypatch.setattr(quantized_embeddings, "_ROWS_PER_PART", 100)

    small = load_base(
        str(tiny_llama), quantization, tmp_path, "cpu", quantize_embeddings=True
    )

    assert torch.equal(small.get_input_embeddings()(IDS), expected[IDS])
    assert not torch.equal(_logits(small), _logits(plain))


def _in_8_bit(matrix: torch.Tensor) -> torch.Tensor:
    """Return what 8 bit with a scale for 256 values keep of a matrix."""
    from bitsandbytes.functional import dequantize_blockwise, quantize_blockwise

    return dequantize_blockwise(*quantize_blockwise(matrix, blocksize=256))


@pytest.mark.parametrize("quantization", [0, 4])
def test_a_quantised_output_head_scores_and_gives_gradients_as_8_bit_keep_it(
    tiny_llama: Path, tmp_path: Path, quantization: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Parts that do not divide the vocabulary.
    monkeypatch.setattr(quantized_embeddings, "_TOKENS_PER_PART", 100)
    plain = load_base(str(tiny_llama), quantization, tmp_path, "cpu")
    matrix = plain.get_output_embeddings().weight
    expected = torch.cat([_in_8_bit(rows) for rows in torch.split(matrix, 100)])

    head = load_base(
        str(tiny_llama), quantization, tmp_path, "cpu", quantize_embeddings=True
    ).get_output_embeddings()
    states = torch.randn(3, matrix.shape[1]).to(matrix.dtype).requires_grad_()
    scores = head(states)
    up = torch.randn(scores.shape).to(scores.dtype)
    (gradient,) = torch.autograd.grad(scores, states, up)

    assert torch.equal(torch.cat([rows.whole() for rows in head.parts]), expected)
    tolerance = {"rtol": 0.02, "atol": 0.02}  # of bfloat16, where a CPU has it
    torch.testing.assert_close(scores, states @ expected.T, **tolerance)
    torch.testing.assert_close(gradient, up @ expected, **tolerance)
    assert not torch.equal(expected, matrix)
    assert {tensor.dtype for tensor in head.buffers()} == {torch.uint8}


def test_a_quantised_output_head_expands_one_part_at_a_time_and_keeps_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(quantized_embeddings, "_TOKENS_PER_PART", 10)
    head = quantized_embeddings.HeadInParts(torch.nn.Linear(64, 100, bias=False))
    alive: list[weakref.ref[torch.Tensor]] = []
    most = 0
    expand = quantized_embeddings._Rows.whole

    def whole(rows: Any) -> torch.Tensor:
        nonlocal most
        made = expand(rows)
        alive.append(weakref.ref(made))
        most = max(most, sum(ref() is not None for ref in alive))
        return made

    monkeypatch.setattr(quantized_embeddings._Rows, "whole", whole)
    head(torch.randn(2, 64, requires_grad=True)).sum().backward()

    assert len(alive) == 20
    assert most == 1


def test_a_quantised_output_head_keeps_its_bias() -> None:
    head = torch.nn.Linear(64, 250)

    narrow = quantized_embeddings.HeadInParts(head)

    assert torch.equal(narrow(torch.zeros(2, 64)), head.bias.expand(2, -1))


def test_embeddings_that_are_the_output_head_stay(
    own_llama: Path, tmp_path: Path
) -> None:
    tied = AutoModelForCausalLM.from_pretrained(own_llama)
    tied.config.tie_word_embeddings = True
    tied.tie_weights()
    tied.save_pretrained(own_llama)

    with pytest.raises(ModelError, match="quantize-embeddings=false"):
        load_base(str(own_llama), 4, tmp_path, "cpu", quantize_embeddings=True)


def test_weights_quantised_in_parts_are_those_quantised_whole(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = load_base(str(tiny_llama), 4, tmp_path / "whole", "cpu").state_dict()
    monkeypatch.setattr(quantized_embeddings, "_ROWS_PER_PART", 16)

    parts = load_base(str(tiny_llama), 4, tmp_path / "parts", "cpu").state_dict()

    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
