"""How a client's un-noised sum of integers is on the wire: exact, packed, and salted.

Flower names an object by the hash of its bytes, and whoever may ask the SuperLink for an object
can test whether one that he guesses is there. A sum has no noise yet, so some salt that nobody
can guess goes with it.
"""

import secrets
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

_SALT_BYTES = 32
_ITEM = np.dtype("<i8")

Integers = npt.NDArray[np.int64]
Shapes = Mapping[str, tuple[int, ...]]


def packed_sum_size(shapes: Shapes) -> int:
    """Return the bytes that `pack_sum` makes of arrays of these shapes."""
    size = sum(int(np.prod(shape)) for shape in shapes.values())
    return size * _ITEM.itemsize + _SALT_BYTES


def pack_sum(integers: Mapping[str, Integers]) -> npt.NDArray[np.uint8]:
    """Return arrays of int64 as bytes, little-endian, in the order of their names, and salt.

    Args:
        integers: Name -> int64 values.

    Returns:
        (packed_sum_size,) bytes, the same number whatever the values.
    """
    flat = [np.ravel(integers[name]).astype(_ITEM) for name in sorted(integers)]
    salt = np.frombuffer(secrets.token_bytes(_SALT_BYTES), np.uint8)
    return np.concatenate([*(part.view(np.uint8) for part in flat), salt])


def unpack_sum(data: npt.NDArray[Any], shapes: Shapes) -> dict[str, Integers]:
    """Return the arrays of `pack_sum`.

    Args:
        data: (packed_sum_size,) bytes, whatever they hold.
        shapes: Name -> shape.
    """
    flat = np.ascontiguousarray(data[:-_SALT_BYTES]).view(_ITEM)
    out, begin = {}, 0
    for name, shape in sorted(shapes.items()):
        count = int(np.prod(shape))
        out[name] = flat[begin : begin + count].astype(np.int64).reshape(shape)
        begin += count
    return out
