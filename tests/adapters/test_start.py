"""A run starts from any adapter that is of its kind, rank, scale and base, and from no other."""

import json
import shutil

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.numpy import load_file, save_file

from fedllm.adapters.files import save_adapter
from fedllm.adapters.peft_model import initial_arrays
from fedllm.adapters.start import start_arrays
from fedllm.errors import AdapterError
from tests.helpers.adapters import KINDS, load_base, make_spec, random_arrays


def read(folder, spec, base, tmp_path):
    return start_arrays(folder, spec, str(base), tmp_path / "home")


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_saved_is_where_the_next_run_starts(tiny_llama, tmp_path, kind):
    spec = make_spec(tiny_llama, kind)
    arrays = random_arrays(spec)
    save_adapter(tmp_path / "a", spec, arrays, str(tiny_llama), {})

    started = read(tmp_path / "a", spec, tiny_llama, tmp_path)

    assert set(started) == set(arrays)
    for name, array in arrays.items():
        np.testing.assert_allclose(started[name], array, rtol=1e-4, atol=1e-5)


def test_an_adapter_of_plain_peft_is_taken(tiny_llama, tmp_path):
    config = LoraConfig(
        r=4, lora_alpha=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"
    )
    model = get_peft_model(load_base(tiny_llama), config)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "lora_B" in name:
                value.normal_()
    model.save_pretrained(tmp_path / "peft")
    spec = make_spec(tiny_llama, "lora")

    started = read(tmp_path / "peft", spec, tiny_llama, tmp_path)

    assert started.keys() == initial_arrays(spec).keys()
    name = next(name for name in started if name.endswith("lora_B.weight"))
    parameter = dict(model.named_parameters())[
        name.replace(".weight", ".default.weight")
    ]
    assert np.array_equal(started[name], parameter.detach().numpy())


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"rank": 2}, "r is 4, and 2 in this run: set adapter.rank"),
        ({"alpha": 8.0}, "lora_alpha is 16.0, and 8.0 in this run: set adapter.alpha"),
        ({"target_modules": "q_proj"}, "v_proj.*not of this adapter"),
        ({"target_modules": "q_proj,k_proj,v_proj"}, "k_proj.*missing"),
        ({"seed": 6}, "is fixed in kind 'ffa-lora', and other than with seed 6"),
        ({"kind": "vera"}, "peft_type is LORA, and VERA in this run"),
        ({"kind": "lora-core"}, "is fixed in kind 'lora-core'"),
    ],
)
def test_another_adapter_is_an_error_that_names_what_differs(
    tiny_llama, saved, tmp_path, more, message
):
    spec = make_spec(tiny_llama, **more)

    with pytest.raises(AdapterError, match=message):
        read(saved, spec, tiny_llama, tmp_path)


def test_an_adapter_of_another_base_is_an_error(tiny_llama, saved, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(tiny_llama, other)
    same = read(
        saved, make_spec(tiny_llama), other.rename(tmp_path / tiny_llama.name), tmp_path
    )
    assert same

    config = json.loads((saved / "adapter_config.json").read_text())
    weights = load_file(tiny_llama / "model.safetensors")
    weights = {name: value + 1 for name, value in weights.items()}
    save_file(
        weights, tmp_path / tiny_llama.name / "model.safetensors", {"format": "pt"}
    )
    config["base_model_name_or_path"] = str(tmp_path / tiny_llama.name)
    (saved / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(AdapterError, match="made for the base model .*set model.name"):
        read(saved, make_spec(tiny_llama), tiny_llama, tmp_path)

    config["base_model_name_or_path"] = str(tmp_path / "gone")
    (saved / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(AdapterError, match="cannot be compared with this run's"):
        read(saved, make_spec(tiny_llama), tiny_llama, tmp_path)


def test_a_damaged_adapter_is_an_error(tiny_llama, saved, tmp_path):
    path, spec = saved / "adapter_model.safetensors", make_spec(tiny_llama)
    weights = load_file(path)
    name = next(name for name in weights if "lora_B" in name)
    broken = {**weights, name: weights[name] * np.float32("nan")}
    save_file(broken, path)
    with pytest.raises(AdapterError, match="not finite"):
        read(saved, spec, tiny_llama, tmp_path)

    del broken[name]
    save_file(broken, path)
    with pytest.raises(AdapterError, match="is missing; set adapter.kind"):
        read(saved, spec, tiny_llama, tmp_path)

    path.write_bytes(b"no weights")
    with pytest.raises(AdapterError, match="adapter_model.safetensors: damaged"):
        read(saved, spec, tiny_llama, tmp_path)

    config = json.loads((saved / "adapter_config.json").read_text())
    save_file(weights, path)
    config["use_rslora"] = True
    (saved / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(AdapterError, match="use_rslora is True, and None in this run"):
        read(saved, spec, tiny_llama, tmp_path)
