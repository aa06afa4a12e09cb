import copy
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import (
    AutoPeftModelForCausalLM,
    IA3Config,
    LoraConfig,
    PeftModel,
    VeraConfig,
    get_peft_model,
)
from safetensors.numpy import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    GPT2Config,
    LlamaConfig,
    Qwen2Config,
)

from fedllm.adapters.files import (
    load_adapter,
    read_base_name,
    read_origin,
    save_adapter,
)
from fedllm.adapters.peft_model import (
    attach,
    check_arrays,
    get_trained,
    initial_arrays,
    peft_arrays,
    set_trained,
)
from fedllm.adapters.resolve import adapter_spec
from fedllm.adapters.spec import AdapterSpec
from fedllm.config import AdapterConfig
from fedllm.errors import AdapterError
from fedllm.models import loading
from fedllm.models.loading import load_config

KINDS = ["ffa-lora", "lora-core", "lora", "ia3", "vera"]
IDS = torch.arange(3, 35).reshape(2, 16)
Q = "base_model.model.model.layers.0.self_attn.q_proj"
K = "base_model.model.model.layers.0.self_attn.k_proj"
V = "base_model.model.model.layers.0.self_attn.v_proj"
DOWN = "base_model.model.model.layers.0.mlp.down_proj"


def make_spec(folder: Path, kind: str = "ffa-lora", seed: int = 5, **more: Any) -> Any:
    config = AdapterConfig(kind=kind, rank=more.pop("rank", 4), **more)
    return adapter_spec(config, load_config(str(folder)), seed)


def load_base(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def load_quantised(folder: Path, home: Path, bits: int) -> Any:
    return loading.load_base(str(folder), bits, home, "cpu")


def load_4_bit_float32(folder: Path) -> Any:
    bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, quantization_config=bits, device_map="cpu"
    )
    return model.eval()


def random_arrays(spec: AdapterSpec, seed: int = 0) -> dict[str, Any]:
    draw = np.random.default_rng(seed)
    return {
        name: draw.normal(0, 0.3, shape).astype(np.float32)
        for name, shape in spec.trained_shapes.items()
    }


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = model(input_ids=IDS).logits
    return out


@pytest.fixture(scope="module")
def attached(tiny_llama: Path) -> dict[str, Any]:
    """Kind -> (model, spec); a test sets the trained values that it wants."""
    made = {}
    for kind in KINDS:
        spec = make_spec(tiny_llama, kind)
        made[kind] = (attach(load_base(tiny_llama), spec).eval(), spec)
    return made


@pytest.fixture
def saved(tiny_llama: Path, tmp_path: Path) -> Path:
    spec = make_spec(tiny_llama)
    origin = {"model": "tiny", "server_round": 3}
    save_adapter(tmp_path / "a", spec, random_arrays(spec), str(tiny_llama), origin)
    return tmp_path / "a"


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


def test_the_spec_needs_no_weights(tiny_llama, tmp_path):
    shutil.copy(tiny_llama / "config.json", tmp_path)

    assert make_spec(tmp_path) == make_spec(tiny_llama)


@pytest.mark.parametrize("kind", KINDS)
def test_a_fresh_adapter_leaves_the_base_unchanged(tiny_llama, attached, kind):
    model, spec = attached[kind]
    set_trained(model, spec, initial_arrays(spec))

    torch.testing.assert_close(logits(model), logits(load_base(tiny_llama)))


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


@pytest.mark.parametrize("kind", KINDS)
def test_peft_alone_opens_a_saved_adapter_and_gives_the_same_logits(
    tiny_llama, attached, tmp_path, kind
):
    model, spec = attached[kind]
    arrays = random_arrays(spec)
    set_trained(model, spec, arrays)
    save_adapter(tmp_path, spec, arrays, str(tiny_llama), {})

    alone = PeftModel.from_pretrained(load_base(tiny_llama), str(tmp_path)).eval()

    torch.testing.assert_close(logits(alone), logits(model), rtol=1e-4, atol=1e-5)
    assert (logits(alone) - logits(load_base(tiny_llama))).abs().max() > 1e-2


def test_peft_alone_finds_the_base_model_by_the_saved_name(saved, tiny_llama):
    alone = AutoPeftModelForCausalLM.from_pretrained(str(saved), dtype=torch.float32)

    loaded = load_adapter(load_base(tiny_llama), saved)
    torch.testing.assert_close(logits(alone.eval()), logits(loaded))


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


def test_veras_rank_may_pass_a_side_and_its_factors_are_shared(tiny_llama):
    spec = make_spec(tiny_llama, "vera", rank=256)

    model = attach(load_base(tiny_llama), spec)

    layers = [m for m in model.modules() if hasattr(m, "vera_lambda_d")]
    assert len(layers) == 4
    assert len({layer.vera_A["default"].data_ptr() for layer in layers}) == 1
    assert layers[0].vera_A["default"].shape == (256, 64)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_trains_and_opens_on_a_quantised_base(
    tiny_llama, tmp_path, kind, bits
):
    spec = make_spec(tiny_llama, kind)
    arrays = random_arrays(spec)
    model = attach(load_quantised(tiny_llama, tmp_path, bits), spec)
    set_trained(model, spec, arrays)
    model(input_ids=IDS, labels=IDS).loss.backward()
    save_adapter(tmp_path / "a", spec, arrays, str(tiny_llama), {})

    opened = load_adapter(
        load_quantised(tiny_llama, tmp_path, bits), tmp_path / "a"
    ).eval()

    gradients = [p.grad for p in model.parameters() if p.requires_grad]
    assert all(g is not None and g.abs().max() > 0 for g in gradients)
    torch.testing.assert_close(logits(opened), logits(model.eval()), atol=0.03, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_peft_alone_gives_the_same_logits_on_a_4_bit_base(tiny_llama, tmp_path, kind):
    spec = make_spec(tiny_llama, kind)
    arrays = random_arrays(spec)
    model = attach(load_4_bit_float32(tiny_llama), spec).eval()
    set_trained(model, spec, arrays)
    save_adapter(tmp_path, spec, arrays, str(tiny_llama), {})

    base = load_4_bit_float32(tiny_llama)
    alone = PeftModel.from_pretrained(base, str(tmp_path)).eval()

    torch.testing.assert_close(logits(alone), logits(model), rtol=1e-4, atol=1e-4)
    with alone.disable_adapter():
        assert (logits(alone) - logits(model)).abs().max() > 1e-2


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


def test_a_rank_above_the_smallest_side_is_refused(tiny_llama):
    assert make_spec(tiny_llama, rank=32).rank == 32
    with pytest.raises(
        AdapterError, match=r"adapter.rank: must be at most 32.*\(got 33\)"
    ):
        make_spec(tiny_llama, rank=33)


@pytest.mark.parametrize("named", ["query", "q_proj,query", "proj", ","])
def test_unknown_target_modules_are_answered_with_the_known_ones(tiny_llama, named):
    with pytest.raises(AdapterError, match="adapter.target-modules.*it has.*q_proj"):
        make_spec(tiny_llama, target_modules=named)


def test_all_linear_is_every_linear_layer_but_the_head(tiny_llama):
    spec = make_spec(tiny_llama, target_modules="all-linear")

    assert len(spec.modules) == 2 * 7
    assert "lm_head" not in spec.target_modules
    assert spec.modules["model.layers.1.mlp.down_proj"] == (64, 128)


def test_the_output_head_is_refused(tiny_llama):
    with pytest.raises(AdapterError, match="lm_head is the output head"):
        make_spec(tiny_llama, target_modules="q_proj,lm_head")


def test_a_module_named_in_full_is_the_only_one_adapted(tiny_llama):
    spec = make_spec(tiny_llama, target_modules="layers.0.self_attn.q_proj")

    model = attach(load_base(tiny_llama), spec)

    assert list(spec.modules) == ["model.layers.0.self_attn.q_proj"]
    adapted = [n for n, _ in model.named_modules() if n.endswith("lora_A.default")]
    assert adapted == [f"{Q}.lora_A.default"]


def test_all_linear_on_a_model_without_linear_layers_is_one_line():
    config = GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=20)

    with pytest.raises(AdapterError, match="adapter.target-modules"):
        adapter_spec(AdapterConfig(target_modules="all-linear"), config, 0)


def test_what_a_saved_adapter_speaks_for_can_be_read(saved, tiny_llama):
    assert read_base_name(saved) == str(tiny_llama)
    origin = read_origin(saved)
    assert (origin["model"], origin["server_round"]) == ("tiny", 3)
    assert origin["adapter"]["kind"] == "ffa-lora"
    assert origin["adapter"]["rank"] == 4


PLAIN = [
    LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False),
    IA3Config(task_type="CAUSAL_LM", init_ia3_weights=False),
    VeraConfig(r=3, target_modules=["q_proj"], init_weights=False),
]


@pytest.mark.parametrize("config", PLAIN, ids=["LoRA", "IA3", "VeRA"])
def test_an_adapter_of_plain_peft_opens(tiny_llama, tmp_path, config):
    plain = get_peft_model(load_base(tiny_llama), copy.deepcopy(config)).eval()
    plain.save_pretrained(str(tmp_path))

    assert read_base_name(tmp_path) == str(tiny_llama)
    assert read_origin(tmp_path) == {}
    loaded = load_adapter(load_base(tiny_llama), tmp_path).eval()
    torch.testing.assert_close(logits(loaded), logits(plain))


@pytest.mark.parametrize(("kind", "layer"), [("ia3", "k_proj"), ("vera", "v_proj")])
def test_another_bases_vectors_are_refused(tiny_llama, tmp_path, kind, layer):
    spec = make_spec(tiny_llama, kind)
    save_adapter(tmp_path, spec, random_arrays(spec), str(tiny_llama), {})
    config = LlamaConfig.from_pretrained(tiny_llama, num_key_value_heads=4)

    with pytest.raises(AdapterError, match=f"another base model.*{layer}.*64 outputs"):
        load_adapter(AutoModelForCausalLM.from_config(config), tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": 32, "head_dim": 16}, "made for another base model.*shape"),
        ({"num_hidden_layers": 1}, "made for another base model: it adapts.*layers.1"),
        ({"num_key_value_heads": 4}, "made for another base model.*v_proj"),
    ],
)
def test_an_adapter_for_another_base_is_refused(saved, tiny_llama, change, message):
    config = LlamaConfig.from_pretrained(tiny_llama, **change)
    base = AutoModelForCausalLM.from_config(config)

    with pytest.raises(AdapterError, match=message):
        load_adapter(base, saved)


def test_a_missing_folder_is_refused(tmp_path):
    with pytest.raises(AdapterError, match="no such folder; --peft-path"):
        read_base_name(tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_folder_that_lacks_a_file_is_refused(saved, name):
    (saved / name).unlink()

    with pytest.raises(AdapterError, match=f"{name} is missing"):
        read_base_name(saved)


def test_pickled_weights_are_refused(saved, tiny_llama):
    (saved / "adapter_model.safetensors").unlink()
    torch.save({}, saved / "adapter_model.bin")

    with pytest.raises(AdapterError, match="in safetensors"):
        load_adapter(load_base(tiny_llama), saved)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"base_model_name_or_path": null}']
)
def test_an_adapter_config_that_names_no_base_is_refused(saved, text):
    (saved / "adapter_config.json").write_text(text)

    with pytest.raises(AdapterError, match="adapter_config.json"):
        read_base_name(saved)


def spoil_weights(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def spoil_names(folder: Path) -> None:
    save_file({"x": np.zeros(3, np.float32)}, folder / "adapter_model.safetensors")


def spoil_dimensions(folder: Path) -> None:
    name = f"{Q}.lora_A.weight"
    save_file({name: np.zeros(64, np.float32)}, folder / "adapter_model.safetensors")


def change_config(folder: Path, **change: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))


@pytest.mark.parametrize(
    "spoil",
    [
        spoil_weights,
        spoil_names,
        spoil_dimensions,
        lambda folder: change_config(folder, r=8),
        lambda folder: change_config(folder, peft_type="NONSENSE"),
    ],
    ids=["cut file", "foreign names", "one dimension", "another rank", "unknown type"],
)
def test_a_damaged_adapter_is_one_line(saved, tiny_llama, spoil):
    spoil(saved)

    with pytest.raises(AdapterError):
        load_adapter(load_base(tiny_llama), saved)


def test_saving_writes_the_same_bytes_every_time(tiny_llama, tmp_path):
    spec = make_spec(tiny_llama)
    digests = set()
    for name in ("one", "two"):
        save_adapter(tmp_path / name, spec, random_arrays(spec), "base", {})
        data = (tmp_path / name / "adapter_model.safetensors").read_bytes()
        digests.add(hashlib.sha256(data).hexdigest())

    assert len(digests) == 1
