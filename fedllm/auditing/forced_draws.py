"""Noise that an audit dictates, through the words that the sampler takes.

Nothing of the sampler is replaced: the words alone are chosen. So a value that comes out is one
that the sampler draws by chance, however seldom: at zero, far out in a tail, or the very one
with which another sum gives the same release.
"""

from functools import lru_cache

import numpy as np
import numpy.typing as npt

from fedllm.privacy.discrete_gaussian import BASE, SPREAD, Table, Words
from fedllm.privacy.mechanism import Integers, SecureGenerator

_WORD = 64
_WORDS = 8
"""Words that tell any two values of the table apart."""

_Chosen = npt.NDArray[np.uint64]


class ForcedDraws(SecureGenerator):
    """A generator whose draws are chosen at some places and chance at all others.

    For audits only. The vector is drawn in one block, so it has at most 2**14 values.

    Args:
        places: (k,) places of the vector, ascending.
        values: (k,) the draws of D(SIGMA) there.
    """

    def __init__(self, places: Integers, values: Integers) -> None:
        self._places = places
        # As `sample` puts a value together: Y1 + SPREAD (Y2 + SPREAD Y3), the last first.
        upper, first = _nearest(values)
        third, second = _nearest(upper)
        self._levels = [words_for(part) for part in (third, second, first)]

    def words(self) -> Words:
        """Return a stream that is chosen at the places, for one vector."""
        chance = super().words()
        levels = iter(self._levels)
        ties: list[_Chosen] = []

        def draw(size: int) -> _Chosen:
            if ties and size == _WORDS - 1:
                return ties.pop(0)
            chosen, is_tied = next(levels)
            drawn = chance(size).copy()
            drawn[self._places] = chosen[:, 0]
            ties.extend(chosen[is_tied, 1:])
            return drawn

        return draw


class ForcedDrawsOfTwo(ForcedDraws):
    """The same for `sample_of_two`, with every value chosen.

    Args:
        values: (d,) the draws.
        spread: Of the sampler.
    """

    def __init__(self, values: Integers, spread: int) -> None:
        self._places = np.arange(len(values))
        upper = np.zeros_like(values)
        if spread:
            upper = (values + spread // 2) // spread
        # `sample_of_two` puts a value together as Y1 + spread Y2, the first first.
        levels = [values - spread * upper, upper][: 2 if spread else 1]
        self._levels = [words_for(level) for level in levels]


def words_for(values: Integers) -> tuple[_Chosen, npt.NDArray[np.bool_]]:
    """Return words from which the sampler's table draws given values.

    Args:
        values: (k,) values of the table.

    Returns:
        (k, 8) words, and (k,) whether the table asks for more than the first.

    Raises:
        ValueError: The table has no such value, which ends at 20 standard deviations.
    """
    unique, place = np.unique(values, return_inverse=True)
    least, most = _draw(0)[0], _draw((1 << (_WORD * _WORDS)) - 1)[0]
    if unique[0] < least or unique[-1] > most:
        raise ValueError(f"the table ends at {least} and {most}")
    starts = _first_words_at_least(np.concatenate([unique, unique + 1]))
    begin, end = np.split(starts, 2)
    chosen = np.zeros((len(unique), _WORDS), np.uint64)
    # Within a value's words none is shared with another value.
    chosen[:, 0] = begin + (end - begin) // np.uint64(2)
    is_tied = np.zeros(len(unique), np.bool_)
    for index in np.flatnonzero(end - begin < 3):
        uniform = _uniform_of(int(unique[index]))
        chosen[index] = _split(uniform)
        is_tied[index] = _draw(uniform)[1]
    return chosen[place], is_tied[place]


def _nearest(values: Integers) -> tuple[Integers, Integers]:
    """Return the nearest multiples of SPREAD, in SPREAD, and what is left."""
    upper = (values + SPREAD // 2) // SPREAD
    return upper, values - SPREAD * upper


@lru_cache(maxsize=1)
def _table() -> Table:
    return Table(BASE)


def _first_words_at_least(values: Integers) -> _Chosen:
    """Return the smallest first word at which the table draws at least each value."""
    low = np.zeros(len(values), np.uint64)
    high = np.full(len(values), 2**_WORD - 1, np.uint64)
    for _ in range(_WORD):
        middle = low + (high - low) // np.uint64(2)
        drawn = _table().draw(len(values), _then_zeros(middle))
        low = np.where(drawn < values, np.minimum(middle, high - 1) + 1, low)
        high = np.where(drawn < values, high, middle)
    return low


def _then_zeros(first: _Chosen) -> Words:
    """Return a stream of given words, then zeros: of ties the smallest value is drawn."""
    streams = iter([first])
    return lambda size: next(streams, np.zeros(size, np.uint64))


def _uniform_of(value: int) -> int:
    """Return a uniform of all words at which the table draws a value that it has."""
    low, high = 0, (1 << (_WORD * _WORDS)) - 1
    while low < high:
        middle = (low + high) // 2
        drawn = _draw(middle)[0]
        if drawn == value:
            return middle
        if drawn < value:
            low = middle + 1
        else:
            high = middle
    return low


def _draw(uniform: int) -> tuple[int, bool]:
    """Return what the table draws of a uniform, and whether the first word did not do."""
    words = _split(uniform)
    parts = [words[:1], words[1:]]
    drawn = _table().draw(1, lambda _: parts.pop(0))
    return int(drawn[0]), not parts


def _split(uniform: int) -> _Chosen:
    """Return a uniform's words, the highest first."""
    return np.frombuffer(uniform.to_bytes(8 * _WORDS, "big"), ">u8").astype(np.uint64)
