"""Embeddings and output head in 4 bit, and quantising without large copies.

A head of 32,000 x 3,200 values takes 0.19 GiB in 16 bits. Kept whole in 4 bit it would be
expanded to that for each product, so it is kept in parts, of which one at a time is.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from bitsandbytes import functional
from bitsandbytes.nn import EmbeddingNF4, Linear4bit, Params4bit

from fedllm.errors import ModelError

# A multiple of bitsandbytes' largest block, so that no block crosses into another part.
_ROWS_PER_PART = 512
# Of a head's part, expanded at once.
_TOKENS_PER_PART = 4096


class HeadInParts(torch.nn.Module):
    """An output head whose matrix lies in parts of the vocabulary, (..., hidden) to scores.

    Attributes:
        parts: Linear layers, in the order of the tokens that they score.
    """

    def __init__(self, parts: list[torch.nn.Module]) -> None:
        super().__init__()
        self.parts = torch.nn.ModuleList(parts)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """Return (..., vocabulary) scores."""
        return torch.cat([part(states) for part in self.parts], -1)


def quantise_embeddings(model: Any) -> None:
    """Put the input embeddings and the output head in NF4; they may not be one tensor.

    Done at each load, which takes seconds: bitsandbytes cannot save such embeddings.

    Args:
        model: A transformers model.

    Raises:
        ModelError: They are one tensor.
    """
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head.weight is table.weight:
        raise ModelError(
            f"{model.name_or_path} uses its embeddings as output head, too, so that"
            " quantising them saves nothing: set model.quantize-embeddings=false"
        )
    # The wide one goes before the next is quantised.
    model.set_output_embeddings(_head_in_nf4(head))
    del head
    small = EmbeddingNF4(*table.weight.shape, dtype=table.weight.dtype, device="meta")
    small.weight = _in_nf4(
        table.weight,
        small,
        # A block may not cross rows; longer ones need fewer scales.
        blocksize=64 if table.embedding_dim % 128 else 128,
        # Compressed scales go together by 256: a row looked up alone gets wrong ones.
        compress_statistics=False,
    )
    model.set_input_embeddings(small)


def _head_in_nf4(head: Any) -> HeadInParts:
    parts: list[torch.nn.Module] = []
    for rows in torch.split(torch.arange(head.out_features), _TOKENS_PER_PART):
        start, stop = int(rows[0]), int(rows[-1]) + 1
        weight = head.weight.data[start:stop]
        part = Linear4bit(
            *(head.in_features, len(rows), False, weight.dtype), device="meta"
        )
        part.weight = _in_nf4(weight, part, blocksize=64, compress_statistics=True)
        if head.bias is not None:
            part.bias = torch.nn.Parameter(head.bias.data[start:stop], False)
        parts.append(part)
    return HeadInParts(parts)


def _in_nf4(weight: torch.Tensor, module: torch.nn.Module, **options: Any) -> Any:
    """Return a weight in NF4, as a module of bitsandbytes' keeps it."""
    with quantised_in_parts():
        return Params4bit(
            *(weight.data, False), quant_type="nf4", module=module, **options
        ).to(weight.device)


@contextmanager
def quantised_in_parts() -> Iterator[None]:
    """Let bitsandbytes quantise a matrix to 4 bit some rows at a time.

    On a CPU it holds several float32 copies of what it quantises. Blocks of values are
    independent, so parts give the same bits; the scales of all are compressed at once.
    """
    whole = functional.quantize_4bit

    def in_parts(
        matrix: torch.Tensor, *args: Any, compress_statistics: bool, **options: Any
    ) -> Any:
        parts = [
            whole(rows, *args, compress_statistics=False, **options)
            for rows in torch.split(matrix, _ROWS_PER_PART)
        ]
        state = parts[0][1]
        state.shape = matrix.shape
        state.absmax = torch.cat([part.absmax for _, part in parts])
        if compress_statistics:
            state.offset = state.absmax.mean()
            state.absmax, state.state2 = functional.quantize_blockwise(
                state.absmax - state.offset, blocksize=256
            )
            state.nested = True
        return torch.cat([packed for packed, _ in parts]), state

    functional.quantize_4bit = in_parts
    try:
        yield
    finally:
        functional.quantize_4bit = whole
