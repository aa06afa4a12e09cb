"""Adapters on disk: what PEFT opens, and what is refused in one line."""

import copy
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import (
    AutoPeftModelForCausalLM,
    IA3Config,
    LoraConfig,
    PeftModel,
    VeraConfig,
    get_peft_model,
)
from safetensors.numpy import save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from fedllm.adapters.files import (
    load_adapter,
    load_adapter_tokenizer,
    read_base_name,
    read_origin,
    save_adapter,
)
from fedllm.adapters.peft_model import attach, set_trained
from fedllm.errors import AdapterError
from fedllm.models.loading import load_tokenizer
from tests.helpers.adapters import (
    IDS,
    KINDS,
    Q,
    load_4_bit_float32,
    load_base,
    load_quantised,
    logits,
    make_spec,
    random_arrays,
)


def test_peft_alone_finds_the_base_model_by_the_saved_name(saved, tiny_llama):
    alone = AutoPeftModelForCausalLM.from_pretrained(str(saved), dtype=torch.float32)

    loaded = load_adapter(load_base(tiny_llama), saved)
    torch.testing.assert_close(logits(alone.eval()), logits(loaded))


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
def test_vectors_of_another_base_raise_an_error(tiny_llama, tmp_path, kind, layer):
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
def test_an_adapter_for_another_base_raises_an_error(
    saved, tiny_llama, change, message
):
    config = LlamaConfig.from_pretrained(tiny_llama, **change)
    base = AutoModelForCausalLM.from_config(config)

    with pytest.raises(AdapterError, match=message):
        load_adapter(base, saved)


def test_a_missing_folder_raises_an_error(tmp_path):
    with pytest.raises(AdapterError, match="no such folder; --peft-path"):
        read_base_name(tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_folder_that_lacks_a_file_raises_an_error(saved, name):
    (saved / name).unlink()

    with pytest.raises(AdapterError, match=f"{name} is missing"):
        read_base_name(saved)


def test_pickled_weights_raise_an_error(saved, tiny_llama):
    (saved / "adapter_model.safetensors").unlink()
    torch.save({}, saved / "adapter_model.bin")

    with pytest.raises(AdapterError, match="in safetensors"):
        load_adapter(load_base(tiny_llama), saved)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"base_model_name_or_path": null}']
)
def test_an_adapter_config_that_names_no_base_raises_an_error(saved, text):
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


@pytest.mark.parametrize(
    "change",
    [
        {"peft_type": "XLORA", "adapters": {"0": "attacker/lora"}},
        {"peft_type": "SHADOW", "shadow_model": "attacker/evil"},
        {"peft_type": ["LORA"]},
        {"peft_type": None},
        {"adapters": {"0": "attacker/lora"}},
    ],
)
def test_a_configuration_outside_the_closed_list_never_reaches_peft(
    saved, tiny_llama, monkeypatch, change
):
    path = saved / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    monkeypatch.setattr(PeftModel, "from_pretrained", lambda *_, **__: 1 / 0)

    with pytest.raises(AdapterError, match="peft_type|adapters"):
        read_base_name(saved)
    with pytest.raises(AdapterError, match="peft_type|adapters"):
        load_adapter(load_base(tiny_llama), saved)


def test_saving_writes_the_same_bytes_every_time(tiny_llama, tmp_path):
    spec = make_spec(tiny_llama)
    digests = set()
    for name in ("one", "two"):
        save_adapter(tmp_path / name, spec, random_arrays(spec), "base", {})
        data = (tmp_path / name / "adapter_model.safetensors").read_bytes()
        digests.add(hashlib.sha256(data).hexdigest())

    assert len(digests) == 1


def test_a_pinned_base_is_peft_s_name_and_revision(tiny_llama, tmp_path):
    spec = make_spec(str(tiny_llama), KINDS[0])
    pinned = "owner/base@" + "a" * 40
    save_adapter(tmp_path, spec, random_arrays(spec), pinned, {})

    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "owner/base"
    assert config["revision"] == "a" * 40
    assert read_base_name(tmp_path) == pinned


@pytest.mark.parametrize("revision", ["v1", "a" * 39, "\x1b[2J", 7])
def test_a_base_that_floats_under_a_name_is_not_fetched(saved, revision):
    path = saved / "adapter_config.json"
    config = json.loads(path.read_text())
    config |= {"base_model_name_or_path": "owner/base", "revision": revision}
    path.write_text(json.dumps(config))

    with pytest.raises(AdapterError, match="revision must be a commit of 40") as caught:
        read_base_name(saved)
    assert str(caught.value).isprintable()


def test_an_adapter_without_a_tokenizer_has_that_of_its_base(saved, tiny_llama):
    tokenizer = load_adapter_tokenizer(saved, str(tiny_llama))

    assert tokenizer.name_or_path == str(tiny_llama)
    assert tokenizer.chat_template is None


def test_a_template_beside_an_adapter_takes_the_place_of_the_base_s(saved, tiny_llama):
    (saved / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")

    tokenizer = load_adapter_tokenizer(saved, str(tiny_llama))

    turns = [{"role": "user", "content": "asthma"}]
    assert tokenizer.apply_chat_template(turns, tokenize=False) == "asthma"


def test_a_tokenizer_beside_an_adapter_takes_the_place_of_the_base_s(
    saved, tiny_chat_llama
):
    own = load_tokenizer(str(tiny_chat_llama))
    own.add_special_tokens({"eos_token": "<0x01>"})
    own.save_pretrained(saved)

    tokenizer = load_adapter_tokenizer(saved, str(tiny_chat_llama))

    assert tokenizer.eos_token == "<0x01>"


def test_tokens_that_the_base_has_no_embedding_for_are_one_line(saved, tiny_chat_llama):
    own = load_tokenizer(str(tiny_chat_llama))
    own.add_tokens(["<ward>"])
    own.save_pretrained(saved)

    with pytest.raises(AdapterError, match=r"no embedding \(<ward>\)"):
        load_adapter_tokenizer(saved, str(tiny_chat_llama))
