"""VeRA: one pair of factors for all layers."""

from fedllm.adapters.peft_model import attach
from tests.helpers.adapters import load_base, make_spec


def test_veras_rank_may_pass_a_side_and_its_factors_are_shared(tiny_llama):
    spec = make_spec(tiny_llama, "vera", rank=256)

    model = attach(load_base(tiny_llama), spec)

    layers = [m for m in model.modules() if hasattr(m, "vera_lambda_d")]
    assert len(layers) == 4
    assert len({layer.vera_A["default"].data_ptr() for layer in layers}) == 1
    assert layers[0].vera_A["default"].shape == (256, 64)
