"""Clipping is total, the sum is exact, and the noise has its promised scale."""

import copy
import itertools
import math
import os
import random

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import algorithms
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import stats

from fedllm.privacy.discrete_gaussian import integer_sensitivity
from fedllm.privacy.mechanism import (
    REASONS,
    FixedPointSum,
    SecureGenerator,
    checked_update,
    clipped,
    clipped_update,
    noised_sum,
    private_sum,
)

REFERENCE = {
    "x": np.array([[0.5, -1.0], [2.0, 0.0]], np.float32),
    "y": np.array([3.0, -0.25, 1e-3], np.float32),
}
C = 0.7


def like_reference(values):
    """Arrays of the reference's names and shapes, filled in turn from values."""
    stream = itertools.cycle(values)
    return {
        name: np.array([next(stream) for _ in range(ref.size)], np.float64).reshape(
            ref.shape
        )
        for name, ref in REFERENCE.items()
    }


class LyingArray(np.ndarray):
    """Says that it is finite and small, whatever it holds."""

    def astype(self, *args, **kwargs):
        return np.full(self.shape, 1e9)


class RaisingMapping(dict):
    def __getitem__(self, key):
        raise RuntimeError("no")


class EndlessKeys(dict):
    def __len__(self):
        return 2

    def __iter__(self):
        return iter(["x", "y", "z"])


hostile_scalars = st.one_of(
    st.none(),
    st.text(max_size=3),
    st.binary(max_size=3),
    st.integers(),
    st.floats(),
    st.lists(st.floats(), max_size=3),
)
hostile_arrays = hnp.arrays(
    dtype=st.sampled_from(
        [np.float16, np.float32, np.float64, np.int32, np.int64, np.bool_, np.complex64]
    ),
    shape=st.one_of(
        st.sampled_from([(2, 2), (3,), (), (1,), (2, 1), (4,), (0,)]),
        hnp.array_shapes(max_dims=3, max_side=3),
    ),
    elements=None,
)
hostile_replies = st.one_of(
    hostile_scalars,
    st.dictionaries(
        st.one_of(st.sampled_from(["x", "y", "z"]), st.text(max_size=2)),
        st.one_of(hostile_scalars, hostile_arrays),
        max_size=4,
    ),
)
any_float = st.floats(allow_nan=True, allow_infinity=True, width=64)


@settings(max_examples=400, deadline=None)
@given(hostile_replies)
def test_clipping_is_total_over_anything(reply):
    clipped = clipped_update(reply, REFERENCE, C)

    if clipped.update is None:
        assert clipped.reason in REASONS
    else:
        assert np.linalg.norm(clipped.update) <= C


@settings(max_examples=400, deadline=None)
@given(st.lists(any_float, min_size=7, max_size=7), st.floats(1e-6, 1e6))
def test_a_well_formed_reply_never_exceeds_the_clip(values, clipping_norm):
    arrays = like_reference(values)

    clipped = clipped_update(arrays, REFERENCE, clipping_norm)

    if not np.isfinite(values).all():
        assert (clipped.update, clipped.reason) == (None, "not-finite")
    else:
        # Exactly: rationals, since a float norm could round either way.
        from fractions import Fraction

        square = sum(Fraction(v) ** 2 for v in clipped.update.tolist())
        assert square <= Fraction(clipping_norm) ** 2


def test_an_update_within_the_clip_is_left_alone():
    arrays = {k: v + np.float32(0.1) for k, v in REFERENCE.items()}

    clipped = clipped_update(arrays, REFERENCE, C)

    expected = [
        (arrays[k].astype(float) - REFERENCE[k].astype(float)).ravel()
        for k in REFERENCE
    ]
    np.testing.assert_array_equal(clipped.update, np.concatenate(expected))


def test_a_large_update_keeps_its_direction_and_gets_norm_c():
    arrays = {k: v + 100 for k, v in REFERENCE.items()}

    update = clipped_update(arrays, REFERENCE, C).update

    assert np.linalg.norm(update) == pytest.approx(C, rel=1e-11)
    np.testing.assert_allclose(
        update / np.linalg.norm(update), 1 / np.sqrt(7), rtol=1e-6
    )


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        (None, "malformed"),
        ([1, 2], "malformed"),
        ({}, "wrong-names"),
        ({"x": REFERENCE["x"]}, "wrong-names"),
        ({**REFERENCE, "z": REFERENCE["x"]}, "wrong-names"),
        ({**REFERENCE, "x": REFERENCE["x"].ravel()}, "wrong-shape"),
        ({**REFERENCE, "y": np.float64(1)}, "wrong-type"),
        ({**REFERENCE, "y": np.array(1.0)}, "wrong-shape"),
        ({**REFERENCE, "y": np.ones(3, np.int64)}, "wrong-type"),
        ({**REFERENCE, "y": np.ones(3, np.longdouble)}, "wrong-type"),
        ({**REFERENCE, "y": np.array([1, 2, 3], object)}, "wrong-type"),
        ({**REFERENCE, "y": [1.0, 2.0, 3.0]}, "wrong-type"),
        ({**REFERENCE, "y": REFERENCE["y"].view(LyingArray)}, "wrong-type"),
        ({**REFERENCE, "y": np.array([1, np.nan, 1.0])}, "not-finite"),
        ({**REFERENCE, "y": np.array([1, -np.inf, 1.0])}, "not-finite"),
        (RaisingMapping(REFERENCE), "malformed"),
        (EndlessKeys(REFERENCE), "wrong-names"),
    ],
)
def test_a_hostile_reply_counts_as_zero_with_a_reason(reply, reason):
    clipped = clipped_update(reply, REFERENCE, C)

    assert clipped.update is None
    assert clipped.reason == reason


def test_rounding_in_a_long_update_does_not_pass_the_clip():
    # Squares of 1e-16 beside one of 1 vanish from a plain running sum.
    size = 2_662_400
    values = np.full(size, 1e-8)
    values[0] = 1.0

    clipped = clipped_update({"x": values * 100}, {"x": np.zeros(size)}, 1.0)

    assert clipped.update is not None
    total = FixedPointSum(size, 1.0)
    total.add(clipped.update)
    # A correctly rounded sum, so that only each square's own rounding is left.
    for vector in (clipped.update, total.total()):
        assert math.fsum((vector**2).tolist()) <= 1.0


def test_a_signalling_nan_is_rejected_without_a_warning():
    signalling = np.full(3, 0x7F800001, np.uint32).view(np.float32)

    # Warnings are errors here, and would make it malformed.
    assert (
        clipped_update({**REFERENCE, "y": signalling}, REFERENCE, C).reason
        == "not-finite"
    )


def test_the_order_of_names_does_not_matter():
    arrays = {k: v * 2 for k, v in REFERENCE.items()}

    forward = clipped_update(arrays, REFERENCE, C).update
    backward = clipped_update(dict(reversed(arrays.items())), REFERENCE, C).update

    np.testing.assert_array_equal(forward, backward)


def test_without_clipping_a_value_beyond_the_limit_is_rejected():
    arrays = {k: v + 2000 for k, v in REFERENCE.items()}

    assert checked_update(arrays, REFERENCE, 1024.0).reason == "out-of-range"
    assert checked_update(arrays, REFERENCE, 4096.0).reason is None


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.lists(any_float, min_size=7, max_size=7), max_size=5),
    st.lists(any_float, min_size=7, max_size=7),
)
def test_one_client_moves_the_sum_by_at_most_c(others, one):
    def total(replies):
        out = FixedPointSum(7, C)
        for values in replies:
            clipped = clipped_update(like_reference(values), REFERENCE, C)
            if clipped.update is not None:
                out.add(clipped.update)
        return out.total()

    moved = total([*others, one]) - total(others)

    # Totals of up to 6C are rounded to float64 on the way out.
    assert np.linalg.norm(moved) <= C + 1e-14


def test_the_sum_is_the_same_in_every_order_to_the_last_bit():
    rng = np.random.default_rng(0)
    vectors = [rng.normal(size=50) * 10.0 ** rng.integers(-6, 0) for _ in range(6)]
    totals = set()
    for order in itertools.permutations(range(6)):
        out = FixedPointSum(50, 10.0)
        for index in order:
            out.add(vectors[index], weight=index + 1)
        totals.add(out.total().tobytes())

    assert len(totals) == 1
    expected = sum((i + 1) * v for i, v in enumerate(vectors))
    np.testing.assert_allclose(out.total(), expected, atol=21 * 10.0 * 2**-40)


@given(hnp.arrays(np.float64, 20, elements=st.floats(-C, C)))
def test_the_fixed_point_never_makes_a_vector_longer(vector):
    out = FixedPointSum(20, C)
    out.add(vector)

    # Scaling rounds twice: one last bit, which is 1/4,000 of the clip's margin.
    assert (np.abs(out.total()) <= np.abs(vector) * (1 + 2.0**-52)).all()


def test_the_sum_takes_large_weights_exactly():
    out = FixedPointSum(1, 1024.0)
    for _ in range(100):
        out.add(np.array([1023.5]), weight=2**31)

    assert out.total()[0] / out.weight == 1023.5


WEIGHT = st.integers(1, 2**21) | st.sampled_from([2**22 - 1, 2**22, 2**22 + 1, 2**36])


@given(st.lists(st.tuples(st.sampled_from([-1, 1]), WEIGHT), min_size=1, max_size=9))
@example([(1, 2**21)] * 9)
def test_the_sum_is_exact_whatever_the_weights_and_their_order(terms):
    total = FixedPointSum(2, 1.0)
    for sign, weight in terms:
        total.add(np.array([sign, sign * 0.75]), weight)

    exact = sum(sign * weight for sign, weight in terms)
    assert total.total().tolist() == [exact, exact * 0.75]


def test_the_sum_refuses_what_it_cannot_hold():
    out = FixedPointSum(2, 1.0)

    with pytest.raises(ValueError, match="above"):
        out.add(np.array([0.0, 1.1]))
    with pytest.raises(ValueError, match="above"):
        out.add(np.array([0.0, np.nan]))
    with pytest.raises(ValueError, match="weights"):
        out.add(np.zeros(2), weight=2**42 + 1)
    with pytest.raises(ValueError, match="weights"):
        out.add(np.zeros(2), weight=0)


def noise_of(z, size, generator=None):
    total = private_sum(size, C, z)
    return noised_sum(total, z, generator or SecureGenerator())


def test_the_noise_is_normal_with_the_promised_scale_and_not_5_percent_off():
    z, size = 1.3, 200_000

    noise = noise_of(z, size) / (z * C)

    def accepts(sample):
        # Variance of 200,000 normals, two-sided at 1e-6: 1 +- 1.6 %.
        statistic = (sample**2).sum()
        return 1e-6 < stats.chi2(size).cdf(statistic) < 1 - 1e-6

    assert accepts(noise)
    assert not accepts(noise * 1.05)
    assert not accepts(noise * 0.95)
    assert stats.kstest(noise, "norm").pvalue > 1e-6
    assert stats.kstest(noise * 1.05, "norm").pvalue < 1e-6


@settings(max_examples=100, deadline=None)
@given(
    st.floats(1e-3, 1e3),
    hnp.arrays(np.float64, 50, elements=st.floats(-C, C)),
)
def test_what_one_client_adds_is_integers_of_a_norm_of_at_most_a(z, vector):
    total = private_sum(50, C, z)
    update = clipped(vector, C).update
    assert update is not None

    total.add(update)

    unit = C / integer_sensitivity(z)
    added = [round(value / unit) for value in total.total().tolist()]
    assert sum(value**2 for value in added) <= integer_sensitivity(z) ** 2


def test_what_is_released_lies_on_the_sums_own_grid():
    # Two sums of neighbours are integers there, so no release tells one from the other for
    # certain. The continuous noise of before lay between.
    z = 1.3
    total = private_sum(1000, C, z)
    total.add(np.full(1000, C / 1000))

    released = noised_sum(total, z, SecureGenerator())

    unit = C / integer_sensitivity(z)
    assert (np.round(released / unit) * unit == released).all()


def test_a_sum_of_another_grid_gets_no_noise():
    for total in (FixedPointSum(3, C), private_sum(3, C, 1.0)):
        with pytest.raises(ValueError, match="not made for this noise"):
            noised_sum(total, 2.0, SecureGenerator())


def test_a_noised_sum_is_exact_up_to_its_largest_number_of_updates():
    total = FixedPointSum(1, 1.0)
    total.add(np.array([1.0]), weight=2**22)

    noised = total.noised(np.array([-(2**62) + 2**40]))

    assert noised[0] == 1.0
    total.add(np.array([1.0]))
    with pytest.raises(ValueError, match="2\\*\\*22 updates"):
        total.noised(np.zeros(1, np.int64))


def test_neighbouring_values_of_noise_are_uncorrelated():
    draws = noise_of(1.0, 300_000) / C

    assert abs(np.mean(draws[1:] * draws[:-1])) < 5 / np.sqrt(300_000)


def test_no_seed_makes_noise_repeat():
    first, second = [], []
    for kept in (first, second):
        random.seed(0)
        np.random.seed(0)  # noqa: NPY002 - what transformers.set_seed does
        kept.append(SecureGenerator().discrete_gaussian(100))

    assert not (first[0] == second[0]).any()


def test_each_call_takes_a_whole_key_from_the_operating_system(monkeypatch):
    handed_out, keys = [], []
    real_random, real_aes = os.urandom, algorithms.AES
    monkeypatch.setattr(
        os, "urandom", lambda n: handed_out.append(real_random(n)) or handed_out[-1]
    )
    monkeypatch.setattr(
        algorithms, "AES", lambda key: keys.append(key) or real_aes(key)
    )
    generator = SecureGenerator()

    for draw in (generator.discrete_gaussian, lambda n: generator.bernoulli(0.5, n)):
        draw(3)
        draw(3)

    assert len(set(keys)) == 4
    assert all(len(key) == 32 and key in handed_out for key in keys)


def test_a_copy_of_the_process_does_not_repeat_its_noise(monkeypatch):
    # Also one with its parent's process id, as in a new namespace.
    monkeypatch.setattr(os, "getpid", lambda: 1)
    generator = SecureGenerator()
    generator.discrete_gaussian(1)
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(write, generator.discrete_gaussian(4).tobytes())
        os._exit(0)
    os.waitpid(child, 0)
    os.close(write)
    theirs = np.frombuffer(os.read(read, 32), np.int64)
    os.close(read)

    assert not (theirs == generator.discrete_gaussian(4)).any()


def test_a_copy_of_a_generator_does_not_repeat_its_draws():
    generator = SecureGenerator()
    generator.discrete_gaussian(1)

    first = copy.deepcopy(generator).discrete_gaussian(4)

    assert not (first == generator.discrete_gaussian(4)).any()


def test_coins_fall_with_their_probability():
    coins = SecureGenerator().bernoulli(0.1, 100_000)

    assert stats.binomtest(int(coins.sum()), 100_000, 0.1).pvalue > 1e-6
    assert not SecureGenerator().bernoulli(0.0, 1000).any()
    assert SecureGenerator().bernoulli(1.0, 1000).all()


def test_samples_are_distinct_and_every_member_is_alike():
    generator = SecureGenerator()
    counts = np.zeros(10)
    for _ in range(3000):
        sample = generator.sample_without_replacement(10, 3)
        assert len(set(sample)) == 3
        counts[sample] += 1

    assert stats.chisquare(counts).pvalue > 1e-6


def test_a_release_without_noise_is_rejected():
    with pytest.raises(ValueError, match="positive noise"):
        private_sum(3, C, 0.0)
    with pytest.raises(ValueError, match="positive clipping"):
        private_sum(3, 0.0, 1.0)
