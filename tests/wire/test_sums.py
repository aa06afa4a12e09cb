"""Sums of integers as bytes."""

import numpy as np

from fedllm.wire.sums import pack_sum, packed_sum_size, unpack_sum

SHAPES = {"b": (4,), "a": (2, 3)}
LARGEST = 2**63 - 1
SUMS = {
    "b": np.array([0, -1, LARGEST, -LARGEST - 1]),
    "a": np.arange(6).reshape(2, 3, order="F"),
}


def test_every_integer_comes_back_to_the_last_bit():
    packed = pack_sum(SUMS)

    assert packed.dtype == np.uint8
    assert packed.shape == (packed_sum_size(SHAPES),)
    for name, value in unpack_sum(packed, SHAPES).items():
        assert value.dtype == np.int64
        np.testing.assert_array_equal(value, SUMS[name])


def test_a_sum_is_as_many_bytes_whatever_it_holds_and_never_the_same_ones():
    """Equal bytes have equal names at the SuperLink, which a guess would find."""
    zeros = {name: np.zeros(shape, np.int64) for name, shape in SHAPES.items()}

    packed = [pack_sum(zeros), pack_sum(zeros), pack_sum(SUMS)]

    assert len({len(data) for data in packed}) == 1
    assert packed[0].tobytes() != packed[1].tobytes()
