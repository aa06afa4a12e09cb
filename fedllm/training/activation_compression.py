"""Activations in 8 bit while a training step keeps them for its backward pass."""

from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary, WeakValueDictionary

import torch
from bitsandbytes.functional import dequantize_blockwise, quantize_blockwise

_BLOCK = 256
# Below this many values the scales and the calls cost more than the bytes saved.
_FEWEST = 4096


@dataclass(frozen=True, eq=False)
class _Compressed:
    """A tensor in blocks of 256 values, each with a scale of its own."""

    values: torch.Tensor
    state: Any
    order: tuple[int, ...]

    def whole(self) -> torch.Tensor:
        """Return the tensor, laid out in memory as it was."""
        back = sorted(range(len(self.order)), key=self.order.__getitem__)
        flat: torch.Tensor = dequantize_blockwise(self.values, self.state)
        return flat.permute(back)


@contextmanager
def compressed_activations(model: torch.nn.Module) -> Iterator[None]:
    """Compress what autograd saves for the backward pass while the context is open.

    Weights and their views are saved as they are, and so are tensors that are not in
    floating point, not finite, or small. A tensor that several operators save is compressed
    once.

    Args:
        model: The model; its parameters and buffers are not copied.

    Note:
        A value is off by about 1 % of the usual size in its block, so gradients are
        approximate; the loss of the forward pass is exact.
    """
    fixed = {
        tensor.untyped_storage().data_ptr()
        for tensor in (*model.parameters(), *model.buffers())
    }
    known: MutableMapping[Any, MutableMapping[Any, _Compressed]] = WeakKeyDictionary()

    def pack(tensor: torch.Tensor) -> torch.Tensor | _Compressed:
        storage = tensor.untyped_storage()
        if (
            not tensor.is_floating_point()
            or tensor.numel() < _FEWEST
            or storage.data_ptr() in fixed
        ):
            return tensor
        order = _order(tensor)
        if order is None:
            return tensor
        copies = known.setdefault(storage, WeakValueDictionary())
        key = (
            tensor._version,
            tensor.storage_offset(),
            tensor.shape,
            tensor.stride(),
        )
        kept = copies.get(key)
        if kept is None:
            flat = tensor.detach().permute(order)
            values, state = quantize_blockwise(flat, blocksize=_BLOCK)
            # An attention mask has infinities, which no scale fits.
            if not state.absmax.isfinite().all():
                return tensor
            kept = copies[key] = _Compressed(values, state, order)
        return kept

    def unpack(kept: torch.Tensor | _Compressed) -> torch.Tensor:
        return kept.whole() if isinstance(kept, _Compressed) else kept

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield


def _order(tensor: torch.Tensor) -> tuple[int, ...] | None:
    """Return the dimensions from the widest stride to the narrowest.

    It is None if the tensor has gaps or overlaps, as a view of a larger one has: it would not
    be smaller.
    """
    order = tuple(sorted(range(tensor.dim()), key=tensor.stride, reverse=True))
    return order if tensor.permute(order).is_contiguous() else None
