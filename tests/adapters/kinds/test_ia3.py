"""IA3: its factors, its modules, and small changes."""

import numpy as np
from transformers import Qwen2Config

from fedllm.adapters.peft_model import (
    get_trained,
    initial_arrays,
    peft_arrays,
    set_trained,
)
from fedllm.adapters.resolve import adapter_spec
from fedllm.config import AdapterConfig
from tests.helpers.adapters import make_spec, random_arrays


def test_the_mean_of_ia3s_changes_is_the_mean_of_its_factors(tiny_llama):
    spec = make_spec(tiny_llama, "ia3")
    one, two = random_arrays(spec, 1), random_arrays(spec, 2)
    mean = {name: (one[name] + two[name]) / 2 for name in one}

    factors = [peft_arrays(spec, arrays) for arrays in (one, two, mean)]

    for name, factor in factors[2].items():
        exact = (factors[0][name] + factors[1][name]) / 2
        np.testing.assert_allclose(factor, exact, atol=1e-6)


def test_ia3_rescales_inputs_of_the_feed_forward_part_alone(tiny_llama):
    spec = make_spec(tiny_llama, "ia3", target_modules="all-linear")

    arrays = peft_arrays(spec, initial_arrays(spec))
    rows = {name.split(".")[-2] for name, a in arrays.items() if a.shape[0] == 1}
    assert rows == {"down_proj"}
    assert all((factor == 1).all() for factor in arrays.values())


def test_ia3_takes_pefts_modules_for_the_architecture():
    small = {"hidden_size": 8, "num_hidden_layers": 1, "vocab_size": 20}
    config = Qwen2Config(**small, num_attention_heads=2, num_key_value_heads=2)

    spec = adapter_spec(AdapterConfig(kind="ia3"), config, 0)

    assert spec.target_modules == ("down_proj", "q_proj", "v_proj")
    assert spec.feedforward == ("down_proj",)


def test_small_changes_of_ia3_are_not_rounded_away(attached):
    model, spec = attached["ia3"]
    tiny = {n: np.full(s, 1e-12, np.float32) for n, s in spec.trained_shapes.items()}

    set_trained(model, spec, tiny)

    assert all((get_trained(model, spec)[n] == tiny[n]).all() for n in tiny)
