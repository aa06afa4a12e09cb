"""Padding-free batches: rows packed end to end, their common prefix computed once.

A model looks at other tokens in attention alone, so everything else can be computed on
tokens in any order. Rows of a chat begin alike (the system prompt, the user's mark): a
token, its position and all that it attends to are then the same in each row, and so is its
state. It is computed once, and its gradient is the sum over the rows.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn.functional import scaled_dot_product_attention

from fedllm.models.attention import NAME

# Models that take every position from `position_ids`, and look at other tokens in attention
# alone; tests/models/test_packing.py tries each.
MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")


def hidden_states(
    base: Any,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    packs: bool = True,
) -> torch.Tensor:
    """Return the last hidden states of all tokens but padding.

    Args:
        base: A causal language model, without PEFT around it.
        input_ids: (batch, length) token ids, padded on the right.
        attention_mask: (batch, length), 0 on padding.
        packs: Whether rows may be packed, if the model is known to allow it.

    Returns:
        (tokens, hidden), row after row. A model that is not known to allow packing
        computes the batch as it is, with its padding.
    """
    mask = attention_mask.bool()
    inner, packs = base.base_model, packs and may_pack(base)
    shared = _num_shared(base, input_ids, mask) if packs else 0
    if not packs or (not shared and mask.all()):
        states: torch.Tensor = inner(
            input_ids=input_ids, attention_mask=attention_mask, use_cache=False
        ).last_hidden_state
        return states[mask]
    # The first row's tokens of the common prefix come first, and stand for all rows.
    rest = mask.clone()
    rest[:, :shared] = False
    places = (rest.flatten().cumsum(0) - 1 + shared).view(mask.shape)
    places[:, :shared] = torch.arange(shared)
    positions = torch.arange(mask.shape[1]).expand(mask.shape)
    ids, position_ids = (
        torch.cat([tokens[0, :shared], tokens[rest]])[None]
        for tokens in (input_ids, positions)
    )
    packed: torch.Tensor = inner(
        input_ids=ids,
        position_ids=position_ids,
        use_cache=False,
        packed=PackedRows(shared, tuple(filter(None, rest.sum(1).tolist()))),
    ).last_hidden_state
    return packed[0][places[mask]]


def may_pack(base: Any) -> bool:
    """Return whether a model computes the same on packed rows."""
    config = base.config
    return (
        config.model_type in MODEL_TYPES
        and config._attn_implementation == NAME
        and not getattr(config, "sliding_window", None)
        and not (base.training and getattr(config, "attention_dropout", 0))
    )


def _num_shared(base: Any, input_ids: torch.Tensor, mask: torch.Tensor) -> int:
    """Return the length of the prefix of all rows, at most all but one of the longest.

    It is 0 under dropout, since each row drops values of its own.
    """
    dropping = base.training and any(
        isinstance(module, torch.nn.Dropout) and module.p for module in base.modules()
    )
    if len(input_ids) == 1 or dropping:
        return 0
    same = ((input_ids == input_ids[:1]) & mask).all(0)
    return min(int(same.long().cumprod(0).sum()), input_ids.shape[1] - 1)


@dataclass(frozen=True)
class PackedRows:
    """Rows of a batch end to end: their common prefix first, then the rest of each.

    Attributes:
        num_shared: Tokens of the common prefix.
        lengths: Tokens of each rest, 1 at least.
    """

    num_shared: int
    lengths: tuple[int, ...]

    @cached_property
    def _mask(self) -> torch.Tensor:
        """Return what is added to one row's scores, (longest, longest): -inf if hidden."""
        longest = self.num_shared + max(self.lengths)
        return torch.full((longest, longest), -torch.inf).triu(1)

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """Return (1, tokens, heads, size) of (1, heads, tokens, size) queries.

        Args:
            query: The queries.
            key: The keys; fewer heads if several heads of the query share one.
            value: As key.
            scale: Factor on the scores.
        """
        attended: torch.Tensor = _PackedAttention.apply(  # type: ignore[no-untyped-call] # torch
            *(query[0], key[0], value[0], self, scale)
        )
        return attended.transpose(0, 1)[None]

    def rows_attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """Return (heads, tokens, size), row by row; arguments as in `attend`, without 1."""
        groups, shared = key.shape[0], self.num_shared
        mask = self._mask.to(query.dtype)
        # Heads that share keys are one example to torch; the keys are expanded, not copied.
        grouped = query.view(groups, -1, *query.shape[1:])
        sizes = [shared, *self.lengths] if shared else [*self.lengths]
        pieces = (torch.split(x, sizes, -2) for x in (grouped, key, value))
        attended: list[torch.Tensor] = []
        common: list[torch.Tensor] = []
        for q, *own in zip(*pieces, strict=True):
            both = own
            if common:
                both = [torch.cat(pair, 1) for pair in zip(common, own, strict=True)]
            elif shared:
                common = own
            k, v = (x[:, None].expand(-1, q.shape[1], -1, -1) for x in both)
            total = k.shape[2]
            visible = mask[total - q.shape[2] : total, :total]
            attended.append(scaled_dot_product_attention(q, k, v, visible, scale=scale))
        return torch.cat(attended, 2).flatten(0, 1)


class _PackedAttention(torch.autograd.Function):
    """`PackedRows.rows_attend`; the backward pass computes it again in float32.

    So the gradients that all rows send to their common prefix are summed before rounding.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        packed: PackedRows,
        scale: float,
    ) -> torch.Tensor:
        ctx.save_for_backward(query, key, value)
        ctx.packed, ctx.scale = packed, scale
        return packed.rows_attend(query, key, value, scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        leaves = [x.detach().float().requires_grad_() for x in ctx.saved_tensors]
        with torch.enable_grad():
            attended = ctx.packed.rows_attend(*leaves, ctx.scale)
        gradients = torch.autograd.grad(attended, leaves, gradient.float())
        return *(x.to(gradient.dtype) for x in gradients), None, None
