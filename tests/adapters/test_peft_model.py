import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedllm.adapters.peft_model import (
    check_arrays,
    get_trained,
    initial_arrays,
    set_trained,
)
from fedllm.errors import AdapterError
from tests.helpers.adapters import KINDS, Q, load_base, logits, make_spec, random_arrays


@pytest.mark.parametrize("kind", KINDS)
def test_a_fresh_adapter_leaves_the_base_unchanged(tiny_llama, attached, kind):
    model, spec = attached[kind]
    set_trained(model, spec, initial_arrays(spec))

    torch.testing.assert_close(logits(model), logits(load_base(tiny_llama)))


@pytest.mark.parametrize("kind", KINDS)
def test_only_declared_values_are_trained_and_travel(attached, kind):
    model, spec = attached[kind]
    arrays = random_arrays(spec)
    set_trained(model, spec, arrays)

    assert set(get_trained(model, spec)) == set(spec.trained_shapes)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert sorted(p.numel() for p in trained) == sorted(a.size for a in arrays.values())
    assert all(p.dtype == torch.float32 for p in trained)


@pytest.mark.parametrize("kind", KINDS)
@settings(
    max_examples=20,
    deadline=None,
    suppress_health_check=[HealthCheck.differing_executors],
)
@given(seed=st.integers(0, 2**32 - 1), exponent=st.integers(-30, 30))
def test_values_that_are_set_come_back_bit_for_bit(attached, kind, seed, exponent):
    model, spec = attached[kind]
    arrays = {
        n: a * np.float32(2.0**exponent) for n, a in random_arrays(spec, seed).items()
    }

    set_trained(model, spec, dict(reversed(arrays.items())))

    for name, value in get_trained(model, spec).items():
        np.testing.assert_array_equal(value, arrays[name])


def test_values_that_come_out_are_copies(attached):
    model, spec = attached["ffa-lora"]
    set_trained(model, spec, random_arrays(spec))
    got = get_trained(model, spec)
    before = {name: value.copy() for name, value in got.items()}

    set_trained(model, spec, initial_arrays(spec))

    assert all((got[name] == before[name]).all() for name in got)


def test_foreign_missing_and_misshapen_arrays_are_named(tiny_llama):
    spec = make_spec(tiny_llama)
    name = f"{Q}.lora_B.weight"
    good = initial_arrays(spec)

    with pytest.raises(AdapterError, match=f"{name}: missing"):
        check_arrays(spec, {n: a for n, a in good.items() if n != name})
    with pytest.raises(AdapterError, match="z: not of this adapter"):
        check_arrays(spec, {**good, "z": np.zeros(1)})
    with pytest.raises(
        AdapterError, match=r"shape must be \(64, 4\) \(got \(4, 64\)\)"
    ):
        check_arrays(spec, {**good, name: good[name].T})
