"""The names and shapes that each kind trains."""

import numpy as np
import pytest

from tests.helpers.adapters import DOWN, KINDS, K, Q, V, make_spec

DECLARED = {
    "ffa-lora": {f"{Q}.lora_B.weight": (64, 4), f"{V}.lora_B.weight": (32, 4)},
    "lora-core": {f"{Q}.lora_core.weight": (4, 4), f"{V}.lora_core.weight": (4, 4)},
    "lora": {
        f"{Q}.lora_A.weight": (4, 64),
        f"{Q}.lora_B.weight": (64, 4),
        f"{V}.lora_A.weight": (4, 64),
        f"{V}.lora_B.weight": (32, 4),
    },
    "ia3": {
        f"{DOWN}.ia3_change": (128,),
        f"{K}.ia3_change": (32,),
        f"{V}.ia3_change": (32,),
    },
    "vera": {
        f"{Q}.vera_lambda_b": (64,),
        f"{Q}.vera_lambda_d": (4,),
        f"{V}.vera_lambda_b": (32,),
        f"{V}.vera_lambda_d": (4,),
    },
}


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_declares_what_it_trains(tiny_llama, kind):
    spec = make_spec(tiny_llama, kind)

    in_layer_0 = {n: s for n, s in spec.trained_shapes.items() if ".layers.0." in n}
    assert in_layer_0 == DECLARED[kind]
    assert list(in_layer_0) == list(DECLARED[kind])
    values = sum(int(np.prod(shape)) for shape in DECLARED[kind].values())
    assert spec.num_trainable == 2 * values
