"""How many bytes an adapter is on the wire: packed, and rounded to fewer bits.

`float32` sends the trained values by name, exactly. The others send one packed array of
bytes, since 52 named arrays cost 22 kB of headers, and from the client its update and not
its values: what is small is rounded by little. The server keeps its own adapter in
float32 and adds updates to that, so what is rounded on the way down moves only where
clients start, and never adds up.
"""

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from fedllm.config import Encoding

PACKED = "packed"
"""Name of the one array of an encoding that packs."""

BLOCK = 256
"""Values that share a scale in `int8`."""

Arrays = Mapping[str, npt.NDArray[np.float32]]
Bytes = npt.NDArray[np.uint8]


def packed_size(size: int, encoding: Encoding) -> int:
    """Return the bytes that `pack` makes of this many values."""
    if encoding == "int8":
        return size + 4 * -(-size // BLOCK)
    return size * (2 if encoding == "float16" else 4)


def pack(arrays: Arrays, encoding: Encoding, generator: np.random.Generator) -> Bytes:
    """Return arrays as bytes, little-endian, in the order of their names.

    Args:
        arrays: Name -> float32 values.
        encoding: `float16` rounds to nearest. `int8` gives each block of 256 values its
            largest size over 127 as scale (float32, all scales first) and rounds to a
            whole number of scales at random, so that its mean is the value.
        generator: Of that rounding.

    Returns:
        (packed_size,) bytes.
    """
    flat = np.concatenate([np.ravel(arrays[name]) for name in sorted(arrays)])
    if encoding != "int8":
        kind = "<f2" if encoding == "float16" else "<f4"
        with np.errstate(over="ignore"):  # the decoder rejects what is too large
            return flat.astype(kind).view(np.uint8)
    with np.errstate(
        all="ignore"
    ):  # a value that is not finite spoils its block's scale
        blocks = _in_blocks(flat)
        scales = np.abs(blocks).max(axis=1) / np.float32(127)
        # A block of zeros has a scale of zero, and any other divisor leaves it zero.
        units = blocks / np.where(scales > 0, scales, 1)[:, None]
        units += generator.random(units.shape, dtype=np.float32)
        units = np.nan_to_num(np.clip(np.floor(units), -127, 127))
    codes = units.astype(np.int8).ravel()[: flat.size]
    return np.concatenate([scales.astype("<f4").view(np.uint8), codes.view(np.uint8)])


def unpack(
    data: Bytes, shapes: Mapping[str, tuple[int, ...]], encoding: Encoding
) -> dict[str, npt.NDArray[np.float32]]:
    """Return what `pack` packed, float32. Total: any bytes of the right number decode.

    Args:
        data: (packed_size,) bytes, from whomever; values may come out not finite.
        shapes: Name -> shape of every array.
        encoding: As of `pack`.
    """
    size = sum(int(np.prod(shape)) for shape in shapes.values())
    if encoding == "int8":
        count = 4 * -(-size // BLOCK)
        with np.errstate(all="ignore"):
            scales = data[:count].view("<f4")
            codes = data[count:].view(np.int8).astype(np.float32)
            flat = (_in_blocks(codes) * scales[:, None]).ravel()[:size]
    else:
        flat = data.view("<f2" if encoding == "float16" else "<f4")
    out, begin = {}, 0
    for name, shape in sorted(shapes.items()):
        count = int(np.prod(shape))
        out[name] = flat[begin : begin + count].astype(np.float32).reshape(shape)
        begin += count
    return out


def _in_blocks(flat: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Return (blocks, 256) values, the last block filled up with zeros."""
    padded = np.zeros(-(-flat.size // BLOCK) * BLOCK, np.float32)
    padded[: flat.size] = flat
    return padded.reshape(-1, BLOCK)
