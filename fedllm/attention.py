"""Attention on a CPU: gradients by matrix products, and batches without padding.

torch's own backward pass of scaled dot product attention multiplies bfloat16 on a CPU
without the processor's matrix instructions: for a small model it was a third of a
training step. The forward pass is torch's.

A batch of unequal rows is computed as one long row, so that only attention sees padding.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

NAME = "fedllm_cpu"
"""What transformers calls it: `attn_implementation`."""

# Models that take every position from `position_ids`, and look at other tokens in attention
# alone; tests/test_attention.py has each.
_PACKED = ("llama", "mistral", "qwen2", "qwen3")

# Scores that exist at a time, so that memory does not grow with the square of the length.
_SCORES = 2**20


def use_fast_gradients(model: PreTrainedModel) -> None:
    """Let a model on a CPU compute attention's gradients by matrix products.

    A model that takes another implementation than torch's keeps it.
    """
    if model.config._attn_implementation == "sdpa":
        AttentionInterface.register(NAME, _attend)
        AttentionMaskInterface.register(NAME, sdpa_mask)
        model.set_attn_implementation(NAME)


@dataclass(frozen=True)
class _Rows:
    """How rows lie one after the other: `where` each token is in (batch, length)."""

    where: torch.Tensor
    batch: int
    length: int

    def apart(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return (1, heads, tokens, size) as (batch, heads, length, size), padded by 0."""
        _, heads, _, size = tokens.shape
        whole = tokens.new_zeros(self.batch * self.length, heads, size)
        whole = whole.index_copy(0, self.where, tokens[0].transpose(0, 1))
        return whole.view(self.batch, self.length, heads, size).transpose(1, 2)

    def together(self, rows: torch.Tensor) -> torch.Tensor:
        """Return (batch, length, heads, size) as (1, tokens, heads, size)."""
        return rows.flatten(0, 1)[self.where][None]


def hidden_states(
    base: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor
) -> torch.Tensor:
    """Return the last hidden states where there is no padding.

    Args:
        base: A causal language model, without PEFT around it.
        input_ids: (batch, length) token ids, padded on the right.
        attention_mask: (batch, length), 0 where padded.

    Returns:
        (tokens, hidden), row after row. Batches without padding, and models that are
        known to allow it, are computed so; others with their padding.
    """
    seen = attention_mask.bool()
    inner, config = base.base_model, base.config
    known = config.model_type in _PACKED and config._attn_implementation == NAME
    if not known or getattr(config, "sliding_window", None) or seen.all():
        states: torch.Tensor = inner(
            input_ids=input_ids, attention_mask=attention_mask, use_cache=False
        ).last_hidden_state
        return states[seen]
    rows = _Rows(seen.flatten().nonzero()[:, 0], *seen.shape)
    positions = torch.arange(seen.shape[1], device=seen.device).expand(seen.shape)
    packed: torch.Tensor = inner(
        input_ids=input_ids[seen][None],
        position_ids=positions[seen][None],
        use_cache=False,
        rows=rows,
    ).last_hidden_state
    return packed[0]


def _attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    rows: _Rows | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Do what transformers' "sdpa" does; it defines arguments and result.

    Of rows that lie one after the other none sees another, and padding comes last, where
    no token looks: the mask that transformers makes of their positions is not needed.
    """
    if rows is not None:
        query, key, value = map(rows.apart, (query, key, value))
        attended, _ = _attend(
            *(module, query, key, value, None, dropout, scaling, True), **kwargs
        )
        return rows.together(attended), None
    wanted = torch.is_grad_enabled() and any(
        tensor.requires_grad for tensor in (query, key, value)
    )
    whole = query.shape[2] == key.shape[2] > 1
    if not wanted or not whole or dropout or kwargs.get("position_bias") is not None:
        plain: tuple[torch.Tensor, None] = sdpa_attention_forward(
            *(module, query, key, value, attention_mask),
            dropout=dropout,
            scaling=scaling,
            is_causal=is_causal,
            **kwargs,
        )
        return plain
    groups = getattr(module, "num_key_value_groups", 1)
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    result: torch.Tensor = _Attention.apply(  # type: ignore[no-untyped-call] # torch
        query,
        repeat_kv(key, groups),
        repeat_kv(value, groups),
        attention_mask,
        is_causal and attention_mask is None,
        query.shape[-1] ** -0.5 if scaling is None else scaling,
    )
    return result.transpose(1, 2).contiguous(), None


class _Attention(torch.autograd.Function):
    """softmax(scale q k^T, masked) v, whose scores are computed again on the way back.

    q, k and v are (batch, heads, length, size); the mask, where there is one, is
    (batch or 1, heads or 1, length, length): True where seen, or what is added.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        causal: bool,
        scale: float,
    ) -> torch.Tensor:
        attended = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=causal, scale=scale
        )
        ctx.save_for_backward(query, key, value, attended, mask)
        ctx.causal, ctx.scale = causal, scale
        return attended

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        query, key, value, attended, mask = ctx.saved_tensors
        batch, heads, length, _ = query.shape
        if ctx.causal:
            mask = query.new_ones(length, length, dtype=torch.bool).tril()
        if mask is not None:
            mask = mask.expand(batch, heads, length, length)
        gradients = [torch.empty_like(tensor) for tensor in (query, key, value)]
        for part in _parts(batch, heads, length):
            # float32 is as fast here, and as exact as torch's kernel.
            q, k, v, o, g = (
                tensor[part].float()
                for tensor in (query, key, value, attended, gradient)
            )
            scores = (q @ k.transpose(-1, -2)).mul_(ctx.scale)
            if mask is not None and mask.dtype == torch.bool:
                scores.masked_fill_(~mask[part], -torch.inf)
            elif mask is not None:
                scores += mask[part]
            weights = scores.softmax(-1)
            # The softmax's gradient: each row less its mean under the weights, which
            # equals the product of the output and its gradient.
            back = (g @ v.transpose(-1, -2)).sub_((g * o).sum(-1, keepdim=True))
            back.mul_(weights).mul_(ctx.scale)
            for whole, one in zip(
                gradients,
                (back @ k, back.transpose(-1, -2) @ q, weights.transpose(-1, -2) @ g),
                strict=True,
            ):
                whole[part] = one
        return *gradients, None, None, None


def _parts(batch: int, heads: int, length: int) -> Iterator[tuple[slice, slice]]:
    """Yield slices of batch and heads that cover both, of few enough scores each."""
    most = max(1, _SCORES // length**2)
    rows, each = max(1, most // heads), min(heads, most)
    for row in range(0, batch, rows):
        for head in range(0, heads, each):
            yield slice(row, row + rows), slice(head, head + each)
