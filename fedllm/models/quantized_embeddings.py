"""Embeddings in 4 bit, the output head in 8, and quantising without large copies.

A head of 32,000 x 3,200 values takes 0.19 GiB in 16 bits. In 4 bit it costs quality (SmolLM2:
0.2 nats of the loss, docs/results.md); in 8 bit, with a scale for 256 values, no loss was
measured. It is kept in parts, of which one at a time is expanded for a product.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from bitsandbytes import functional
from bitsandbytes.nn import EmbeddingNF4, Params4bit
from torch.autograd.function import once_differentiable

from fedllm.errors import ModelError

# A multiple of bitsandbytes' largest block, so that no block crosses into another part.
_ROWS_PER_PART = 512
# Of a head's part, expanded at once.
_TOKENS_PER_PART = 4096
# Values of the head that share a scale.
_BLOCK = 256


class HeadInParts(torch.nn.Module):
    """A frozen output head in 8 bit, (..., hidden) to (..., vocabulary).

    Attributes:
        parts: The rows of some tokens each, in the order of the tokens.

    Args:
        head: The linear layer that it replaces.
    """

    def __init__(self, head: Any) -> None:
        super().__init__()
        weights = torch.split(head.weight.data, _TOKENS_PER_PART)
        self.parts = torch.nn.ModuleList(map(_Rows, weights))
        self.bias = head.bias

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """Return (..., vocabulary) scores."""
        products: list[torch.Tensor] = [
            # torch leaves `apply` without types.
            _Product.apply(states, rows)  # type: ignore[no-untyped-call]
            for rows in self.parts
        ]
        scores = torch.cat(products, -1)
        return scores if self.bias is None else scores + self.bias


class _Rows(torch.nn.Module):
    """Rows of a matrix, with a scale for 256 values."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        values, self.state = functional.quantize_blockwise(weight, blocksize=_BLOCK)
        self.register_buffer("values", values, persistent=False)

    def whole(self) -> torch.Tensor:
        """Return the expanded rows."""
        rows: torch.Tensor = functional.dequantize_blockwise(self.values, self.state)
        return rows


class _Product(torch.autograd.Function):
    """states @ rows^T; the backward pass expands the rows again instead of keeping them."""

    @staticmethod
    def forward(ctx: Any, states: torch.Tensor, rows: _Rows) -> torch.Tensor:
        ctx.rows = rows
        return states @ rows.whole().T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        return gradient @ ctx.rows.whole(), None


def quantise_embeddings(model: Any) -> None:
    """Put the input embeddings in NF4 and the output head in 8 bit.

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
    # The wide head is released before the embeddings are quantised.
    model.set_output_embeddings(HeadInParts(head))
    del head
    small = EmbeddingNF4(*table.weight.shape, dtype=table.weight.dtype, device="meta")
    with quantised_in_parts():
        small.weight = Params4bit(
            table.weight.data,
            requires_grad=False,
            quant_type="nf4",
            # A block must not cross rows; longer ones need fewer scales.
            blocksize=64 if table.embedding_dim % 128 else 128,
            # Compressed scales share one by 256: a row looked up alone would get wrong ones.
            compress_statistics=False,
            module=small,
        ).to(table.weight.device)
    model.set_input_embeddings(small)


@contextmanager
def quantised_in_parts() -> Iterator[None]:
    """Make bitsandbytes quantise a matrix to 4 bit some rows at a time.

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
