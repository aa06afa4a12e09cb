"""Attention on a CPU whose gradients are computed in float32.

torch's own backward pass of scaled dot product attention is several times slower in
bfloat16 than in float32 on a CPU: for a small model it was a third of a training step.
"""

from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

NAME = "fedllm_cpu"
"""Its name in transformers: `attn_implementation`."""


def use_fast_gradients(model: PreTrainedModel) -> None:
    """Make a model on a CPU compute attention's gradients in float32.

    A model that uses another implementation than torch's keeps it.
    """
    if model.config._attn_implementation == "sdpa":
        AttentionInterface.register(NAME, attend)
        AttentionMaskInterface.register(NAME, sdpa_mask)
        model.set_attn_implementation(NAME)


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    packed: Any = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attend as transformers' "sdpa" does, which defines arguments and result.

    Packed rows (packing.py) attend to themselves and to what they share: no mask is needed.
    """
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if packed is not None:
        together: torch.Tensor = packed.attend(query, key, value, scale)
        return together, None
    needs_gradient = torch.is_grad_enabled() and any(
        tensor.requires_grad for tensor in (query, key, value)
    )
    whole = query.shape[2] == key.shape[2] > 1
    if (
        not needs_gradient
        or not whole
        or dropout
        or kwargs.get("position_bias") is not None
    ):
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
        scale,
    )
    return result.transpose(1, 2).contiguous(), None


class _Attention(torch.autograd.Function):
    """softmax(scale q k^T, masked) v; the backward pass computes it again in float32.

    q, k and v are (batch, heads, length, size). A mask is (batch or 1, heads or 1, length,
    length): True for a visible token, or what is added to its score.
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
        ctx.save_for_backward(query, key, value, mask)
        ctx.causal, ctx.scale = causal, scale
        return scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=causal, scale=scale
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        *inputs, mask = ctx.saved_tensors
        if mask is not None and mask.is_floating_point():
            mask = mask.float()
        leaves = [x.detach().float().requires_grad_() for x in inputs]
        with torch.enable_grad():
            query, key, value = leaves
            attended = scaled_dot_product_attention(
                *(query, key, value, mask), is_causal=ctx.causal, scale=ctx.scale
            )
        gradients = torch.autograd.grad(attended, leaves, gradient.float())
        return *(x.to(gradient.dtype) for x in gradients), None, None, None
