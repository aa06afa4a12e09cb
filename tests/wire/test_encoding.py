"""Fewer bytes for an adapter, and what that does to its values."""

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fedllm.wire.encoding import BLOCK, pack, packed_size, unpack

SHAPES = {"b": (5, 100), "a": (300,), "c": ()}
ENCODINGS = ("float32", "float16", "int8")


def arrays(seed: int = 0) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(seed)
    return {
        name: generator.standard_normal(shape).astype(np.float32)
        for name, shape in SHAPES.items()
    }


def there_and_back(values, encoding, seed=0):
    packed = pack(values, encoding, np.random.default_rng(seed))
    shapes = {name: value.shape for name, value in values.items()}
    return unpack(packed, shapes, encoding)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_what_is_packed_has_the_declared_size_and_comes_back_by_name(encoding):
    values = arrays()
    packed = pack(values, encoding, np.random.default_rng(0))
    # The other side may hold its names in another order.
    back = unpack(packed, dict(reversed(SHAPES.items())), encoding)

    assert packed.nbytes == packed_size(801, encoding)
    assert {name: value.shape for name, value in back.items()} == SHAPES
    for name, value in values.items():
        assert back[name].dtype == np.float32
        np.testing.assert_allclose(back[name], value, atol=0.04)


def test_a_value_costs_about_four_two_and_one_bytes():
    sizes = [packed_size(1_331_200, encoding) for encoding in ENCODINGS]

    assert sizes == [5_324_800, 2_662_400, 1_352_000]


def test_float32_is_exact_and_float16_rounds_to_nearest():
    values = arrays()

    for name, value in there_and_back(values, "float32").items():
        np.testing.assert_array_equal(value, values[name])
    for name, value in there_and_back(values, "float16").items():
        np.testing.assert_array_equal(value, values[name].astype(np.float16))


@given(
    hnp.arrays(
        np.float32,
        st.integers(1, 3 * BLOCK),
        elements=st.floats(-(2.0**100), 2.0**100, width=32),
    )
)
@example(np.float32([1.4e-45]))
def test_int8_is_off_by_less_than_a_scale_of_its_block(value):
    back = there_and_back({"a": value}, "int8")["a"]

    for start in range(0, value.size, BLOCK):
        part = slice(start, start + BLOCK)
        scale = np.abs(value[part]).max() / 127
        # A scale near float32's smallest number, 1.4e-45, is itself off by up to that.
        off = np.abs(back[part] - value[part]).max()
        assert off <= scale * 1.001 + 127 * 1.4e-45


def test_random_rounding_has_the_value_as_its_mean():
    values = {"a": np.linspace(-1, 1, BLOCK, dtype=np.float32)}
    draws = 400
    mean = np.mean(
        [there_and_back(values, "int8", seed)["a"] for seed in range(draws)], axis=0
    )

    # One rounding is off by at most half a scale in standard deviation.
    allowed = 6 * 0.5 / 127 / draws**0.5
    assert np.abs(mean - values["a"]).max() < allowed
    nearest = np.round(values["a"] * 127) / 127
    assert np.abs(nearest - values["a"]).max() > allowed


def test_the_same_seed_rounds_the_same_way():
    values = arrays()

    first, again = (there_and_back(values, "int8", 7)["b"] for _ in range(2))
    np.testing.assert_array_equal(first, again)
    assert (there_and_back(values, "int8", 8)["b"] != first).any()


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("spoiled", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_not_finite_does_not_come_back_finite(encoding, spoiled):
    values = arrays()
    values["a"][3] = spoiled

    assert not np.isfinite(there_and_back(values, encoding)["a"]).all()


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_zeros_stay_zeros(encoding):
    values = {name: np.zeros(shape, np.float32) for name, shape in SHAPES.items()}

    for value in there_and_back(values, encoding).values():
        assert not value.any()


@given(st.sampled_from(ENCODINGS), st.data())
def test_any_bytes_of_the_right_number_decode(encoding, data):
    size = packed_size(801, encoding)
    seed = data.draw(st.integers(0, 2**32))
    raw = np.frombuffer(np.random.default_rng(seed).bytes(size), np.uint8)

    back = unpack(raw, SHAPES, encoding)

    assert {name: value.shape for name, value in back.items()} == SHAPES
