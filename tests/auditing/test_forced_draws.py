"""Draws that an audit dictates come out of the sampler itself."""

import math

import numpy as np
import pytest

from fedllm.auditing.forced_draws import ForcedDraws, words_for
from fedllm.privacy.discrete_gaussian import BASE, VARIANCE, Table

SIGMA = math.sqrt(VARIANCE)


def test_the_sampler_draws_what_is_forced_and_chance_elsewhere():
    values = [0, 1, -1, 170, 171, -12345, 7**10]
    values += [round(s * SIGMA) for s in (-19.9, -12, -8, -3.3, 5, 9, 15, 19.9)]
    places = np.arange(0, 3 * len(values), 3)
    forced = np.array(values, np.int64)

    drawn = ForcedDraws(places, forced).discrete_gaussian(1000)

    assert drawn[places].tolist() == values
    others = np.delete(drawn, places)
    assert len(np.unique(others)) == len(others)
    assert np.std(others) == pytest.approx(SIGMA, rel=0.2)


def test_two_vectors_are_not_forced_by_one_stream():
    forced = ForcedDraws(np.array([3]), np.array([5]))

    assert forced.discrete_gaussian(20)[3] == forced.discrete_gaussian(20)[3] == 5


def test_words_are_found_for_every_value_of_the_table_within_nine_deviations():
    values = np.arange(-9 * BASE, 9 * BASE + 1, 7)

    words, is_tied = words_for(values)

    rest = iter(words[is_tied, 1:])
    first = iter([words[:, 0]])
    drawn = Table(BASE).draw(
        len(values), lambda n: next(first, None) if n > 7 else next(rest)
    )
    assert drawn.tolist() == values.tolist()


@pytest.mark.parametrize("value", [-20 * BASE - 1, 20 * BASE + 1, 10**9])
def test_a_value_beyond_the_table_is_an_error(value):
    with pytest.raises(ValueError, match="the table ends at -20480 and 20480"):
        words_for(np.array([0, value]))
