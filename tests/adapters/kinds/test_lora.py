"""LoRA and its variants: fixed factors, and the mean of clients."""

import os
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file

from fedllm.adapters.files import save_adapter
from fedllm.adapters.peft_model import initial_arrays, peft_arrays
from tests.helpers.adapters import Q, V, make_spec, random_arrays


@pytest.mark.parametrize("kind", ["ffa-lora", "lora-core"])
def test_fixed_factors_are_orthonormal(tiny_llama, kind):
    spec = make_spec(tiny_llama, kind, target_modules="all-linear")
    eye = {name: np.eye(4, dtype=np.float32) for name in spec.trained_shapes}
    trained = random_arrays(spec) if kind == "ffa-lora" else eye

    for name, value in peft_arrays(spec, trained).items():
        if "lora_A" in name:
            np.testing.assert_allclose(value @ value.T, np.eye(4), atol=1e-6)
        elif kind == "lora-core":
            np.testing.assert_allclose(value.T @ value, np.eye(4), atol=1e-6)


def test_fixed_factors_differ_by_module_and_by_seed(tiny_llama):
    spec, other = make_spec(tiny_llama, seed=5), make_spec(tiny_llama, seed=6)
    arrays = peft_arrays(spec, initial_arrays(spec))
    others = peft_arrays(other, initial_arrays(other))
    factors = [value for name, value in arrays.items() if "lora_A" in name]

    assert len({factor.tobytes() for factor in factors}) == len(factors)
    assert all((arrays[n] != others[n]).any() for n in arrays if "lora_A" in n)


_PRINT_DIGEST = """
import hashlib, sys
import numpy as np
from fedllm.adapters.peft_model import AdapterSpec, initial_arrays, peft_arrays
assert "torch" not in sys.modules
for kind in ("ffa-lora", "lora-core", "lora", "vera"):
    spec = AdapterSpec(kind, 8, 16.0, 0.0, ("q",), {"m.q": (192, 576)}, 42)
    trained = initial_arrays(spec)
    if kind == "lora-core":
        trained = {n: np.eye(8, dtype=np.float32) for n in trained}
    values = peft_arrays(spec, trained)
    print(hashlib.sha256(b"".join(values[n].tobytes() for n in sorted(values))).hexdigest())
"""


def test_fixed_factors_are_the_same_in_every_process():
    outputs = []
    for hash_seed in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-c", _PRINT_DIGEST],
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            capture_output=True,
            text=True,
            check=True,
        )
        outputs.append(done.stdout.split())

    assert outputs[0] == outputs[1]
    assert len(set(outputs[0])) == 4


def test_a_saved_core_is_an_ordinary_lora(tiny_llama, tmp_path):
    spec = make_spec(tiny_llama, "lora-core")
    save_adapter(tmp_path, spec, random_arrays(spec), "base", {})

    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert saved[f"{Q}.lora_A.weight"].shape == (4, 64)
    assert saved[f"{V}.lora_B.weight"].shape == (32, 4)
    assert not [name for name in saved if "core" in name]


@pytest.mark.parametrize("kind", ["ffa-lora", "lora-core"])
def test_the_mean_of_the_trained_values_is_the_mean_of_the_updates(tiny_llama, kind):
    spec = make_spec(tiny_llama, kind)
    one, two = random_arrays(spec, 1), random_arrays(spec, 2)
    mean = {name: (one[name] + two[name]) / 2 for name in one}

    products = [
        folded[f"{Q}.lora_B.weight"] @ folded[f"{Q}.lora_A.weight"]
        for folded in (peft_arrays(spec, arrays) for arrays in (one, two, mean))
    ]

    np.testing.assert_allclose(products[2], (products[0] + products[1]) / 2, atol=1e-6)


def rounds_of_sgd(a, features, targets, reparametrise, rounds=4, steps=3, rate=0.02):
    """The product BA after rounds in which clients train B by SGD on squared errors.

    With `reparametrise` the server splits BA anew by its SVD after each round, as FedSVD does.
    """
    b = np.zeros((targets[0].shape[1], len(a)))
    for _ in range(rounds):
        trained = []
        for x, y in zip(features, targets, strict=True):
            own = b.copy()
            for _ in range(steps):
                own -= rate * ((x @ a.T @ own.T - y).T @ (x @ a.T)) / len(x)
            trained.append(own)
        b = np.mean(trained, axis=0)
        if reparametrise:
            left, values, right = np.linalg.svd(b @ a, full_matrices=False)
            rank = len(a)
            a, b = right[:rank], left[:, :rank] * values[:rank]
    return b @ a


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_under_sgd_fedsvd_is_a_fixed_orthonormal_a_and_with_kaiming_it_is_not(
    tiny_llama, seed
):
    # A gradient of B is seen through A alone, and the step of BA through A'A: a turned basis
    # of the same rows is the same training.
    spec = make_spec(tiny_llama, "ffa-lora", seed=seed)
    factors = peft_arrays(spec, initial_arrays(spec))
    a = next(v for name, v in factors.items() if "lora_A" in name).astype(np.float64)
    generator = np.random.default_rng(seed)
    features = [generator.normal(size=(40, a.shape[1])) for _ in range(3)]
    targets = [x @ generator.normal(size=(a.shape[1], 6)) for x in features]
    kaiming = generator.uniform(-1, 1, a.shape) / np.sqrt(a.shape[1])

    def difference(start):
        fixed = rounds_of_sgd(start, features, targets, reparametrise=False)
        anew = rounds_of_sgd(start, features, targets, reparametrise=True)
        return np.linalg.norm(fixed - anew) / np.linalg.norm(fixed)

    # The factor is orthonormal within float32.
    assert difference(a) < 1e-6
    assert difference(kaiming) > 0.05
