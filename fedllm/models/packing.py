"""A batch as one line of tokens: nothing padded, and what all rows begin with once.

A model looks at other tokens in attention alone, so everything else may be computed on
tokens in any order. Rows of a chat begin alike (the system prompt, the user's mark): a
token and its position, and all that it sees, are then the same in each row, and so is
its state. It is computed once and its gradient is the sum of what each row tells it.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn.functional import scaled_dot_product_attention

from fedllm.models.attention import NAME

# Models that take every position from `position_ids`, and look at other tokens in attention
# alone; tests/test_packing.py has each.
MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")


def hidden_states(
    base: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor
) -> torch.Tensor:
    """Return the last hidden states of all tokens that are no padding.

    Args:
        base: A causal language model, without PEFT around it.
        input_ids: (batch, length) token ids, padded on the right.
        attention_mask: (batch, length), 0 where padded.

    Returns:
        (tokens, hidden), row after row. A model that is not known to allow it computes
        the batch as it is, with its padding.
    """
    seen = attention_mask.bool()
    inner, packs = base.base_model, _may_pack(base)
    shared = _num_shared(base, input_ids, seen) if packs else 0
    if not packs or (not shared and seen.all()):
        states: torch.Tensor = inner(
            input_ids=input_ids, attention_mask=attention_mask, use_cache=False
        ).last_hidden_state
        return states[seen]
    # Of the common beginning the first row's tokens come first, and stand for all.
    rest = seen.clone()
    rest[:, :shared] = False
    places = (rest.flatten().cumsum(0) - 1 + shared).view(seen.shape)
    places[:, :shared] = torch.arange(shared)
    positions = torch.arange(seen.shape[1]).expand(seen.shape)
    ids, where = (
        torch.cat([tokens[0, :shared], tokens[rest]])[None]
        for tokens in (input_ids, positions)
    )
    packed: torch.Tensor = inner(
        input_ids=ids,
        position_ids=where,
        use_cache=False,
        line=Line(shared, tuple(filter(None, rest.sum(1).tolist()))),
    ).last_hidden_state
    return packed[0][places[seen]]


def _may_pack(base: Any) -> bool:
    """Tell whether a model computes the same on a line."""
    config = base.config
    return (
        config.model_type in MODEL_TYPES
        and config._attn_implementation == NAME
        and not getattr(config, "sliding_window", None)
        and not (base.training and getattr(config, "attention_dropout", 0))
    )


def _num_shared(base: Any, input_ids: torch.Tensor, seen: torch.Tensor) -> int:
    """Return how many tokens all rows begin with, at most all but one of the longest.

    0 where values are dropped by chance, since each row drops its own.
    """
    dropping = base.training and any(
        isinstance(module, torch.nn.Dropout) and module.p for module in base.modules()
    )
    if len(input_ids) == 1 or dropping:
        return 0
    same = ((input_ids == input_ids[:1]) & seen).all(0)
    return min(int(same.long().cumprod(0).sum()), input_ids.shape[1] - 1)


@dataclass(frozen=True)
class Line:
    """How the rows of a batch lie: their common beginning first, then each one's rest.

    Attributes:
        num_shared: Tokens of the common beginning.
        lengths: Tokens of each rest, 1 at least.
    """

    num_shared: int
    lengths: tuple[int, ...]

    @cached_property
    def _mask(self) -> torch.Tensor:
        """What is added to the scores of one row, (longest, longest): -inf where unseen."""
        longest = self.num_shared + max(self.lengths)
        return torch.full((longest, longest), -torch.inf).triu(1)

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """Return (1, tokens, heads, size) of (1, heads, tokens, size) queries.

        Args:
            query: What looks.
            key: As query, or with fewer heads, each for as many of the query's.
            value: As key.
            scale: What scores are multiplied by.
        """
        attended: torch.Tensor = _LineAttention.apply(  # type: ignore[no-untyped-call] # torch
            *(query[0], key[0], value[0], self, scale)
        )
        return attended.transpose(0, 1)[None]

    def rows_attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """Return (heads, tokens, size), row by row; arguments as in `attend`, without 1."""
        groups, shared = key.shape[0], self.num_shared
        mask = self._mask.to(query.dtype)
        # To torch a group of heads that share keys is an example; keys have a stride of 0.
        grouped = query.view(groups, -1, *query.shape[1:])
        sizes = [shared, *self.lengths] if shared else [*self.lengths]
        pieces = (torch.split(x, sizes, -2) for x in (grouped, key, value))
        found: list[torch.Tensor] = []
        common: list[torch.Tensor] = []
        for q, *own in zip(*pieces, strict=True):
            both = own
            if common:
                both = [torch.cat(pair, 1) for pair in zip(common, own, strict=True)]
            elif shared:
                common = own
            k, v = (x[:, None].expand(-1, q.shape[1], -1, -1) for x in both)
            total = k.shape[2]
            seen = mask[total - q.shape[2] : total, :total]
            found.append(scaled_dot_product_attention(q, k, v, seen, scale=scale))
        return torch.cat(found, 2).flatten(0, 1)


class _LineAttention(torch.autograd.Function):
    """What `Line.rows_attend` says, computed again in float32 on the way back.

    There what rows tell their common beginning is summed before it is rounded.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        line: Line,
        scale: float,
    ) -> torch.Tensor:
        ctx.save_for_backward(query, key, value)
        ctx.line, ctx.scale = line, scale
        return line.rows_attend(query, key, value, scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        leaves = [x.detach().float().requires_grad_() for x in ctx.saved_tensors]
        with torch.enable_grad():
            attended = ctx.line.rows_attend(*leaves, ctx.scale)
        found = torch.autograd.grad(attended, leaves, gradient.float())
        return *(x.to(gradient.dtype) for x in found), None, None
