"""The mechanism: clip each update, sum exactly, add secure Gaussian noise once.

NumPy and SciPy only. All that changes privacy is in the arguments; nothing here reads a
configuration, and no draw can be seeded.
"""

import math
import os
import secrets
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from scipy.special import ndtri

Vector = npt.NDArray[np.float64]
_Array = TypeVar("_Array", bound=npt.NDArray[Any])

WRONG_NAMES = "wrong-names"
WRONG_SHAPE = "wrong-shape"
WRONG_TYPE = "wrong-type"
NOT_FINITE = "not-finite"
OUT_OF_RANGE = "out-of-range"
MALFORMED = "malformed"

REASONS = (WRONG_NAMES, WRONG_SHAPE, WRONG_TYPE, NOT_FINITE, OUT_OF_RANGE, MALFORMED)
"""The reasons why an update counts as zero."""

# Rounding in a norm summed pairwise is below 1e-13 of it at any length, in scaling one
# rounding a value: a vector clipped to this share of C has a true norm of at most C.
_MARGIN = 1 - 1e-12
_CHUNK = 1 << 18
# Values worked on at a time, so that intermediate results stay in a core's cache.
_BLOCK = 1 << 14


class SecureGenerator:
    """A secure random generator: AES in counter mode, keyed by the operating system.

    Guarantee:
        No configuration, seed or global generator influences a draw, and no two
        generators, processes or forks of one share a key. Uniforms are 2**52 midpoints,
        symmetric and never 0 or 1, so a normal draw is finite and lies within 8.21
        standard deviations. The noise is a floating-point approximation of the Gaussian:
        attacks on its lowest bits (Mironov 2012) are not covered.
    """

    def __init__(self) -> None:
        self._new_key()

    def __reduce__(self) -> str:
        """Raise: a copy would repeat every draw."""
        raise TypeError("a secure generator cannot be copied or pickled")

    def standard_normal(self, size: int) -> Vector:
        """Draw (size,) float64 standard normal values by the inverse CDF."""
        out = np.empty(size, np.float64)
        for start in range(0, size, _CHUNK):
            part = out[start : start + _CHUNK]
            # With 53 bits the half would be rounded away above 2**52, and the largest
            # draw would be infinite.
            part[:] = self._bits(52, len(part))
            part += 0.5
            part *= 2.0**-52
            ndtri(part, out=part)
        return out

    def bernoulli(self, probability: float, size: int) -> npt.NDArray[np.bool_]:
        """Draw (size,) independent coins that are True with this probability."""
        return self._bits(53, size) < probability * 2.0**53

    def sample_without_replacement(self, population: int, size: int) -> list[int]:
        """Draw `size` different integers below `population`, every subset equally likely."""
        return secrets.SystemRandom().sample(range(population), size)

    def _bits(self, bits: int, size: int) -> npt.NDArray[np.uint64]:
        """Draw (size,) integers below 2**bits."""
        if os.getpid() != self._pid:
            # A fork would continue its parent's stream.
            self._new_key()
        words = np.frombuffer(self._stream.update(bytes(8 * size)), np.uint64)
        return words >> np.uint64(64 - bits)

    def _new_key(self) -> None:
        cipher = Cipher(algorithms.AES(os.urandom(32)), modes.CTR(os.urandom(16)))
        self._stream = cipher.encryptor()
        self._pid = os.getpid()


@dataclass(frozen=True)
class Checked:
    """One client's update, or the reason why it counts as zero.

    Attributes:
        update: (d,) client adapter minus global adapter in the order of the global
            adapter's names; None for a zero update.
        reason: None, or one of REASONS.
    """

    update: Vector | None
    reason: str | None = None


def checked_update(
    arrays: object, reference: Mapping[str, npt.NDArray[np.float32]], limit: float
) -> Checked:
    """Return the update of a reply. Total: it never raises.

    Args:
        arrays: The client's arrays: name -> array. Anything else is malformed.
        reference: The global adapter.
        limit: Largest size of one value.
    """
    difference = _difference(arrays, reference)
    if isinstance(difference, str):
        return Checked(None, difference)
    update, largest = difference
    return Checked(update) if largest <= limit else Checked(None, OUT_OF_RANGE)


def clipped_update(
    arrays: object,
    reference: Mapping[str, npt.NDArray[np.float32]],
    clipping_norm: float,
) -> Checked:
    """Return the update scaled to a norm of at most C. Total: it never raises.

    Args:
        arrays: The client's arrays: name -> array. Anything else is malformed.
        reference: The global adapter.
        clipping_norm: C, in the range that config.py allows.

    Guarantee:
        The result is None, which counts as zero, or a finite vector whose exact L2 norm
        is at most C. It is a function of this one reply: no other reply enters.
    """
    difference = _difference(arrays, reference)
    if isinstance(difference, str):
        return Checked(None, difference)
    update, largest = difference
    return _scaled(update, largest, clipping_norm, out=update)


def clipped(vector: Vector, clipping_norm: float) -> Checked:
    """Return a vector scaled to a norm of at most C.

    Args:
        vector: (d,) float64 values.
        clipping_norm: C, in the range that config.py allows.

    Guarantee:
        The result is None, which counts as zero, if a value is NaN or infinite; otherwise a
        finite vector whose exact L2 norm is at most C.
    """
    largest = _largest(vector)
    if not math.isfinite(largest):
        return Checked(None, NOT_FINITE)
    return _scaled(vector, largest, clipping_norm, out=np.empty_like(vector))


def _scaled(
    vector: Vector, largest: float, clipping_norm: float, out: Vector
) -> Checked:
    """Clip a vector whose largest value is known; `out` may be the vector itself."""
    if largest == 0.0:
        return Checked(vector)
    whole = vector
    unit = 1.0
    if not 1e-100 < largest < 1e100:
        # Their squares would leave the range, or all its digits.
        unit = largest
        vector = vector / unit
    # NumPy sums pairwise; a running sum (np.dot) loses small squares beside large ones,
    # and a client could choose its values so that their true norm passes C.
    squares = [np.sum(np.square(part)) for part in _blocks(vector)]
    length = float(np.sqrt(np.sum(squares)))
    bound = clipping_norm * _MARGIN
    if unit <= bound / length:
        return Checked(whole)
    for part, scaled in zip(_blocks(vector), _blocks(out), strict=True):
        np.multiply(part, bound / length, out=scaled)
    return Checked(out)


def _largest(vector: Vector) -> float:
    """Return the size of the largest value; NaN if one is NaN."""
    if not vector.size:
        return 0.0
    with np.errstate(all="ignore"):  # a signalling NaN would warn
        return float(np.max([vector.max(), -vector.min()]))


def _blocks(vector: _Array) -> Iterator[_Array]:
    """Yield consecutive views of a vector."""
    for start in range(0, len(vector), _BLOCK):
        yield cast(_Array, vector[start : start + _BLOCK])


class FixedPointSum:
    """A sum that is the same in every order: integers of limit * 2**-40.

    Values are cut toward zero, so a vector's norm grows by a last bit at most, 2**-52 of it,
    which the margin of `clipped` covers 4,000 times. Each value is held as at most 2**40
    units, times a weight. 64 bits hold a weight of 2**22: before they are full, all but the
    low 20 bits are carried to a second integer.

    Args:
        size: Length d of the vectors.
        limit: Largest size of one value: the clipping norm if updates are clipped.
    """

    _UNITS = 2.0**40
    _MAX_WEIGHT = 1 << 42
    _ROOM = 1 << 22

    def __init__(self, size: int, limit: float) -> None:
        self._limit = limit
        self._high = np.zeros(size, np.int64)
        self._low = np.zeros(size, np.int64)
        self._weight = 0
        self._held = 0

    @property
    def weight(self) -> int:
        """Sum of the weights so far."""
        return self._weight

    def add(self, vector: Vector, weight: int = 1) -> None:
        """Add weight * vector.

        Args:
            vector: (d,) finite values of size at most `limit`.
            weight: A positive whole number.

        Raises:
            ValueError: A value is above the limit, or the weights pass 2**42.
        """
        if weight < 1 or self._weight + weight > self._MAX_WEIGHT:
            raise ValueError(
                f"the weights of a sum must stay within 1 and 2**42: {weight}"
            )
        if self._held + weight > self._ROOM:
            self._carry()
        fits = weight <= self._ROOM
        for values, high, low in zip(
            _blocks(vector), _blocks(self._high), _blocks(self._low), strict=True
        ):
            scaled = values / self._limit
            scaled *= self._UNITS
            if not (scaled.max() <= self._UNITS and scaled.min() >= -self._UNITS):
                raise ValueError(f"a value of the sum is above {self._limit}")
            units = scaled.astype(np.int64)  # which cuts toward zero
            if not fits:
                high += (units >> 20) * weight
                units &= 0xFFFFF
            if weight > 1:
                units *= weight
            low += units
        self._held += min(weight, self._ROOM)
        self._weight += weight

    def _carry(self) -> None:
        for high, low in zip(_blocks(self._high), _blocks(self._low), strict=True):
            high += low >> 20
            low &= 0xFFFFF
        self._held = 0

    def total(self) -> Vector:
        """Return the sum, (d,) float64."""
        self._carry()
        # Exact integers until here; what follows is one fixed sequence of roundings.
        units = self._high.astype(np.float64) * 2.0**20 + self._low
        return units * (self._limit / self._UNITS)


def noised_sum(
    total: FixedPointSum,
    noise_multiplier: float,
    clipping_norm: float,
    generator: SecureGenerator,
) -> Vector:
    """Return S = sum + N(0, (zC)^2 I), (d,) float64: the one release of a round.

    Args:
        total: Sum of clipped updates, each added once with weight 1.
        noise_multiplier: z > 0.
        clipping_norm: C, in the range that config.py allows.
        generator: The source of the noise.

    Raises:
        ValueError: z or C is not positive: without noise nothing is private.

    Guarantee:
        With updates of norm at most C, one client sending nothing changes the sum by at
        most C: a Gaussian mechanism with noise multiplier z under zero-out, and z/2
        under replace-one.
    """
    if not (noise_multiplier > 0 and clipping_norm > 0):
        raise ValueError(
            "a release needs a positive noise multiplier and clipping norm"
        )
    released = total.total()
    noise = generator.standard_normal(len(released))
    noise *= noise_multiplier * clipping_norm
    released += noise
    return released


def _difference(
    arrays: object, reference: Mapping[str, npt.NDArray[np.float32]]
) -> tuple[Vector, float] | str:
    """Return arrays - reference by name, flat, and the size of its largest value.

    Total: an update that cannot be read is returned as one of REASONS.
    """
    try:
        if not isinstance(arrays, Mapping):
            return MALFORMED
        if len(arrays) != len(reference) or set(arrays) != set(reference):
            return WRONG_NAMES
        difference = np.empty(sum(start.size for start in reference.values()))
        begin, largest = 0, 0.0
        for name, start in reference.items():
            value = arrays[name]
            # A subclass could answer every check below as it likes.
            if type(value) is not np.ndarray:
                return WRONG_TYPE
            if value.dtype.kind != "f" or value.dtype.itemsize > 8:
                return WRONG_TYPE
            if value.shape != start.shape:
                return WRONG_SHAPE
            part = difference[begin : begin + start.size]
            begin += start.size
            with np.errstate(all="ignore"):  # a signalling NaN would warn
                part[:] = value.ravel()
                part -= start.ravel()
            size = _largest(part)
            if not math.isfinite(size):
                return NOT_FINITE
            largest = max(largest, size)
        return difference, largest
    except Exception:  # noqa: BLE001 - total: any reply that fails counts as zero
        return MALFORMED
