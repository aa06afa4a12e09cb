"""The mechanism: clip each update, sum exactly, add secure Gaussian noise once.

NumPy and cryptography only. All that changes privacy is in the arguments; nothing here reads a
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

from fedllm.privacy.discrete_gaussian import (
    LARGEST_SENSITIVITY,
    Words,
    integer_sensitivity,
    sample,
)

Vector = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]
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
# Values worked on at a time, so that intermediate results stay in a core's cache.
_BLOCK = 1 << 14


class SecureGenerator:
    """A secure random generator: AES in counter mode, keyed by the operating system.

    Guarantee:
        No configuration, seed or global generator influences a draw. Every call takes a new
        key from the operating system and keeps none, so no two calls share a stream,
        whatever was copied: the generator, the process, or the machine between two calls.
    """

    def discrete_gaussian(self, size: int) -> Integers:
        """Draw (size,) independent integers of the discrete Gaussian D(SIGMA)."""
        return sample(size, self.words())

    def bernoulli(self, probability: float, size: int) -> npt.NDArray[np.bool_]:
        """Draw (size,) independent coins that are True with this probability."""
        bits = self.words()(size) >> np.uint64(64 - 53)
        return bits < probability * 2.0**53

    def sample_without_replacement(self, population: int, size: int) -> list[int]:
        """Draw `size` different integers below `population`, every subset equally likely."""
        return secrets.SystemRandom().sample(range(population), size)

    def words(self) -> Words:
        """Return a stream of uniform words of 64 bits under a new key."""
        cipher = Cipher(algorithms.AES(os.urandom(32)), modes.CTR(os.urandom(16)))
        stream = cipher.encryptor()
        return lambda size: np.frombuffer(stream.update(bytes(8 * size)), np.uint64)


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
    """A sum that is the same in every order: integers of limit / units.

    Values are cut toward zero. Rounding before the cut makes a vector's norm longer by
    2**-52 of it at most, which the margin of `clipped` covers 4,000 times: a vector of norm C =
    limit adds integers whose exact norm is at most `units`. Each value is held as at most
    2**40 units, times a weight. 64 bits hold a weight of 2**22: before they are full, all but
    the low 20 bits are carried to a second integer.

    Args:
        size: Length d of the vectors.
        limit: Largest size of one value: the clipping norm if updates are clipped.
        units: Units that `limit` has, at most 2**40. A sum to which noise is added has
            `integer_sensitivity(z)`.
    """

    _MAX_WEIGHT = 1 << 42
    _ROOM = 1 << 22

    def __init__(
        self,
        size: int,
        limit: float,
        units: int = LARGEST_SENSITIVITY,
    ) -> None:
        self._limit = limit
        self._units = units
        self._high = np.zeros(size, np.int64)
        self._low = np.zeros(size, np.int64)
        self._weight = 0
        self._held = 0

    @property
    def size(self) -> int:
        """Length d of the vectors."""
        return len(self._low)

    @property
    def units(self) -> int:
        """Units that the limit has."""
        return self._units

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
            scaled *= self._units
            if not (scaled.max() <= self._units and scaled.min() >= -self._units):
                raise ValueError(f"a value of the sum is above {self._limit}")
            cut = scaled.astype(np.int64)  # which cuts toward zero
            if not fits:
                high += (cut >> 20) * weight
                cut &= 0xFFFFF
            if weight > 1:
                cut *= weight
            low += cut
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
        whole = self._high.astype(np.float64) * 2.0**20 + self._low
        return whole * (self._limit / self._units)

    def noised(self, noise: Integers) -> Vector:
        """Return the sum after (d,) integers were added to its own, (d,) float64.

        Raises:
            ValueError: The weights pass 2**22, so that the integers may not fit.
        """
        whole = self.integers()
        whole += noise
        released: Vector = whole.astype(np.float64)
        released *= self._limit / self._units
        return released

    def integers(self) -> Integers:
        """Return the sum in units, (d,) int64, exactly.

        Raises:
            ValueError: The weights pass 2**22, so that the integers may not fit.
        """
        if self._weight > self._ROOM:
            raise ValueError(f"a noised sum holds 2**22 updates (got {self._weight})")
        self._carry()
        return (self._high << 20) + self._low


def private_sum(
    size: int, clipping_norm: float, noise_multiplier: float
) -> FixedPointSum:
    """Return the empty sum to which `noised_sum` can add noise.

    Args:
        size: d, the length of the updates.
        clipping_norm: C, in the range that config.py allows.
        noise_multiplier: z > 0.

    Raises:
        ValueError: z or C is not positive: without noise nothing is private.
    """
    if not clipping_norm > 0:
        raise ValueError("a release needs a positive clipping norm")
    units = integer_sensitivity(noise_multiplier)
    return FixedPointSum(size, clipping_norm, units)


def noised_sum(
    total: FixedPointSum, noise_multiplier: float, generator: SecureGenerator
) -> Vector:
    """Return S = sum + noise, (d,) float64: the one release of a round.

    Args:
        total: `private_sum` of this z, and clipped updates, each added once with weight 1.
        noise_multiplier: z > 0.
        generator: The source of the noise.

    Raises:
        ValueError: z is not positive: without noise nothing is private. Or the sum's grid is
            another's.

    Guarantee:
        With updates of norm at most C, one client sending nothing changes the sum's
        integers by a vector of norm at most A = `integer_sensitivity(z)`. What is returned is
        a function of those integers plus a discrete Gaussian, which is a Gaussian mechanism
        with noise multiplier z under zero-out, and z/2 under replace-one, to the last bit.
    """
    if total.units != integer_sensitivity(noise_multiplier):
        raise ValueError("the sum was not made for this noise multiplier")
    return total.noised(generator.discrete_gaussian(total.size))


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
