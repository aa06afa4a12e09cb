"""Whether our fast ways through a model give what the library's own forward gives.

Our own are the answer loss in parts (answer_loss.py), attention with gradients in float32
(attention.py) and packed rows with their common beginning computed once (packing.py). Each
rests on how a model is built: a head that caps or scales its scores, for one, is no product
with the output layer. So one forward pass of transformers' own is compared, on a few public
tokens, and what differs is left to the library.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from fedllm.errors import ModelError
from fedllm.models import attention, packing
from fedllm.models.limits import num_embeddings

logger = logging.getLogger(__name__)

_TRIAL = "fedllm_trial"
"""Name in transformers of the attention that compares two."""

_LENGTHS = (7, 5)
_SHARED = 2
"""Tokens of the two rows of the trial, and of those how many are the same."""

_ATTENTION_TOLERANCE = 1e-4
"""Largest relative error of an attention's result or gradients, all in float32."""
_PACKING_TOLERANCE = {torch.float32: 1e-3}
_ROUNDED_PACKING_TOLERANCE = 0.1
"""Of the last hidden states in 16 bits, which another order of the tokens rounds otherwise;
a token that saw another row, or had another position, would be off by its own size."""


@dataclass(frozen=True)
class FastPaths:
    """What of a model may be computed our way.

    Attributes:
        head: The scores are what the output layer makes of the last hidden states.
        packing: Packed rows have the hidden states of rows on their own.
    """

    head: bool
    packing: bool


_known: WeakKeyDictionary[Any, FastPaths] = WeakKeyDictionary()


def fast_paths(base: Any) -> FastPaths:
    """Return what may be computed our way, tried at a model's first use in a process.

    A model whose attention differs gets the library's back.

    Args:
        base: A causal language model, without PEFT around it; adapters may be on it.

    Raises:
        ModelError: transformers' own forward fails on this model.
    """
    if base not in _known:
        _known[base] = _try(base)
    return _known[base]


def _try(base: Any) -> FastPaths:
    """Compare our ways with the library's on two rows of public tokens."""
    ids, mask = _public_rows(base)
    faults = []
    is_fast = getattr(base.config, "_attn_implementation", None) == attention.NAME
    with _as_in_evaluation(base):
        agreed: list[bool] = []
        if is_fast:
            AttentionInterface.register(_TRIAL, _comparing(agreed))
            AttentionMaskInterface.register(_TRIAL, sdpa_mask)
            base.set_attn_implementation(_TRIAL)
        try:
            states, head = _own_forward(base, ids, mask)
        finally:
            if is_fast:
                name = attention.NAME if all(agreed) else "sdpa"
                base.set_attn_implementation(name)
        if not all(agreed):
            faults.append("attention")
        if not head:
            faults.append("answer loss in parts")
        packed = head and packing.may_pack(base) and _packs(base, ids, mask, states)
        if head and packing.may_pack(base) and not packed:
            faults.append("packing")
    if faults:
        logger.info(
            "%s differs from transformers' own forward on this model, which is used "
            "instead: as right as the library, and slower",
            " and ".join(faults),
        )
    return FastPaths(head, packed)


def _public_rows(base: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (2, 7) token ids that depend on no data, and the mask of their padding."""
    vocabulary = num_embeddings(base)
    # A token that stands for an image would demand one.
    markers = {v for k, v in vars(base.config).items() if "token" in k and _is_id(v)}
    count = sum(_LENGTHS)
    ids = [(11 + 13 * place * place) % vocabulary for place in range(4 * count)]
    chosen = [token for token in ids if token not in markers] or ids
    chosen = (chosen * count)[:count]
    first, second = chosen[: _LENGTHS[0]], chosen[_LENGTHS[0] :]
    second[:_SHARED] = first[:_SHARED]
    longest = max(_LENGTHS)
    rows = [row + [row[0]] * (longest - len(row)) for row in (first, second)]
    mask = [[1] * size + [0] * (longest - size) for size in _LENGTHS]
    device = next(base.parameters()).device
    return torch.tensor(rows, device=device), torch.tensor(mask, device=device)


def _is_id(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


@contextmanager
def _as_in_evaluation(base: Any) -> Iterator[None]:
    """Switch off what is random, gradients and inference mode; all is restored."""
    modes = {module: module.training for module in base.modules()}
    base.eval()
    try:
        # What is made in inference mode could not be differentiated.
        with torch.inference_mode(False), torch.no_grad():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def _own_forward(
    base: Any, ids: torch.Tensor, mask: torch.Tensor
) -> tuple[torch.Tensor, bool]:
    """Return the last hidden states of the library's forward, and whether the head is plain.

    Plain: it gets those states as they are, and what it returns are the scores, both to the
    last bit. So no tolerance has to be chosen, and a cap shows even where it changes little.
    """
    inputs: list[torch.Tensor] = []
    outputs: list[torch.Tensor] = []
    states: list[torch.Tensor] = []
    head = base.get_output_embeddings()

    def note_head(_: Any, args: Any, output: torch.Tensor) -> None:
        inputs.append(args[0])
        outputs.append(output)

    hooks = [
        head.register_forward_hook(note_head),
        base.base_model.register_forward_hook(
            lambda _, __, output: states.append(output.last_hidden_state)
        ),
    ]
    try:
        scores = base(input_ids=ids, attention_mask=mask, use_cache=False).logits
        if not states:
            # OPT calls a part of its base model, past the hook.
            base.base_model(input_ids=ids, attention_mask=mask, use_cache=False)
    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError) as error:
        text = str(error).strip().splitlines() or [type(error).__name__]
        raise ModelError(
            f"{getattr(base, 'name_or_path', '')}: transformers' own forward pass fails on "
            f"this model here ({text[0]}): try model.quantization=0, or another model"
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
    plain = (
        len(inputs) == len(states) == 1
        and torch.equal(inputs[0].float(), states[0].float())
        and torch.equal(outputs[0].float(), scores.float())
    )
    return states[0], plain


def _packs(
    base: Any, ids: torch.Tensor, mask: torch.Tensor, states: torch.Tensor
) -> bool:
    """Return whether packed rows have the states that rows on their own have."""
    wanted = states[mask.bool()]
    try:
        got = packing.hidden_states(base, ids, mask)
    except (RuntimeError, ValueError, TypeError, IndexError):
        return False
    most = _PACKING_TOLERANCE.get(wanted.dtype, _ROUNDED_PACKING_TOLERANCE)
    return _error(got, wanted) < most


def _comparing(agreed: list[bool]) -> Callable[..., Any]:
    """Return the library's attention, which also notes whether ours does the same."""

    def attend(
        module: Any, query: Any, key: Any, value: Any, mask: Any, **options: Any
    ) -> Any:
        def results(function: Callable[..., Any]) -> list[torch.Tensor]:
            # In float32, so that only a difference in kind shows.
            leaves = [x.detach().float().requires_grad_() for x in (query, key, value)]
            wide = mask.float() if _is_added(mask) else mask
            with torch.enable_grad():
                result = function(module, *leaves, wide, **options)[0]
            weights = torch.linspace(-1, 1, result.numel(), device=result.device)
            gradients = torch.autograd.grad(result, leaves, weights.view_as(result))
            return [result.detach(), *gradients]

        theirs = results(sdpa_attention_forward)
        try:
            ours = results(attention.attend)
        except (RuntimeError, ValueError, TypeError, IndexError):
            agreed.append(False)
        else:
            pairs = zip(ours, theirs, strict=True)
            agreed.append(
                all(_error(one, other) < _ATTENTION_TOLERANCE for one, other in pairs)
            )
        return sdpa_attention_forward(module, query, key, value, mask, **options)

    return attend


def _is_added(mask: torch.Tensor | None) -> bool:
    """Return whether a mask is added to scores, and not a choice."""
    return mask is not None and mask.is_floating_point()


def _error(got: torch.Tensor, wanted: torch.Tensor) -> float:
    """Return the relative error; inf if shapes differ or a value is not finite."""
    if got.shape != wanted.shape or not got.isfinite().all():
        return float("inf")
    difference = (got.float() - wanted.float()).norm()
    return float(difference / wanted.float().norm().clamp(min=1e-12))
