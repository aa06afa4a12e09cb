"""The merged model says what base and adapter say together."""

import json
import shutil

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from fedllm.adapters.files import load_adapter, save_adapter
from fedllm.adapters.resolve import adapter_spec
from fedllm.client.personal import make_personal
from fedllm.commands.export import main
from fedllm.config_parsing import parse_run_config
from fedllm.models import loading
from fedllm.models.loading import load_base, load_tokenizer
from fedllm.models.location import load_config
from tests.helpers.deliveries import deliver_to
from tests.helpers.rows import write_rows
from tests.helpers.sample_runs import write_run


@pytest.fixture
def adapter(tiny_chat_llama, tmp_path, monkeypatch):
    """An adapter in a run's folder."""
    monkeypatch.setenv("FEDLLM_HOME", str(tmp_path / "home"))
    write_run(tmp_path / "run")
    return make_adapter(tmp_path / "run" / "peft_final", str(tiny_chat_llama), "lora")


def make_adapter(folder, name, kind):
    config = parse_run_config({"adapter.kind": kind, "adapter.rank": 4})
    spec = adapter_spec(config.adapter, load_config(name), 1)
    draw = np.random.default_rng(0)
    arrays = {n: draw.normal(0, 0.5, s) for n, s in spec.trained_shapes.items()}
    save_adapter(folder, spec, arrays, name, {})
    return folder


@pytest.mark.parametrize("kind", ["lora", "ffa-lora", "lora-core", "ia3", "vera"])
def test_merged_logits_are_those_of_base_and_adapter(
    kind, tiny_chat_llama, tmp_path, monkeypatch
):
    monkeypatch.setenv("FEDLLM_HOME", str(tmp_path / "home"))
    name, out = str(tiny_chat_llama), tmp_path / "merged"
    folder = make_adapter(tmp_path / "run" / "peft", name, kind)
    command = ["--peft-path", str(folder), "--out", str(out)]

    main(command)

    ids = torch.arange(20).unsqueeze(0)
    with torch.inference_mode():
        base = load_base(name, 0, tmp_path / "home", in_float32=True)
        before = base(ids).logits
        together = load_adapter(base, folder)(ids).logits
        merged = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)(ids)
    assert torch.allclose(merged.logits, together, atol=1e-3)
    assert not torch.allclose(before, together, atol=1e-2)
    with pytest.raises(SystemExit, match="exists already"):
        main(command)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantised_export_is_near_the_merged_model_and_carries_the_card(
    bits, adapter, tmp_path
):
    command = ["--peft-path", str(adapter), "--out"]
    main([*command, str(tmp_path / "whole")])
    main([*command, str(tmp_path / "small"), "--quantize", str(bits)])

    ids = torch.arange(20).unsqueeze(0)
    with torch.inference_mode():
        whole, small = (
            AutoModelForCausalLM.from_pretrained(tmp_path / name)(ids).logits.float()
            for name in ("whole", "small")
        )
    config = json.loads((tmp_path / "small" / "config.json").read_text())
    assert config["quantization_config"][f"load_in_{bits}bit"]
    for name in ("whole", "small"):
        card = (tmp_path / name / "README.md").read_text()
        assert 'library_name: "transformers"' in card and "AutoPeft" not in card
        assert "Client-level differential privacy" in card
        assert "AutoModelForCausalLM.from_pretrained" in card
    assert (tmp_path / "small" / "tokenizer_config.json").exists()
    off = (whole - small).norm() / whole.norm()
    assert 0 < off < (0.3 if bits == 4 else 0.05)


class Hub:
    """Notes what is sent; has one repository."""

    def __init__(self):
        self.calls = []

    def create_repo(self, name, private, exist_ok):
        self.calls.append(("create", name, private))
        if name == "me/there" and not exist_ok:
            raise OSError("409 already there")

    def upload_folder(self, repo_id, folder_path):
        self.calls.append(("upload", repo_id, folder_path))


def test_the_hub_gets_a_private_new_repository_and_only_where_asked(
    adapter, tmp_path, monkeypatch, capsys
):
    hub = Hub()
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: hub)
    command = ["--peft-path", str(adapter), "--out"]

    main([*command, str(tmp_path / "a")])
    assert hub.calls == []
    capsys.readouterr()
    main([*command, str(tmp_path / "b"), "--push-to-hub", "me/new", "--json"])
    assert json.loads(capsys.readouterr().out) == {
        "model": str(tmp_path / "b"),
        "pushed_to": "me/new",
    }
    assert hub.calls == [
        ("create", "me/new", True),
        ("upload", "me/new", str(tmp_path / "b")),
    ]
    with pytest.raises(SystemExit, match="me/there: 409 already there; the model is"):
        main([*command, str(tmp_path / "c"), "--push-to-hub", "me/there"])
    assert len(hub.calls) == 3


def test_a_personal_adapter_is_merged_only_by_an_explicit_flag_and_keeps_its_warning(
    tiny_chat_llama, tmp_path, monkeypatch
):
    monkeypatch.setenv("FEDLLM_HOME", str(tmp_path / "home"))
    node = {"data-path": write_rows(tmp_path / "own.jsonl", 60)}
    folder = make_personal(deliver_to(tiny_chat_llama, node)).folder
    out = tmp_path / "merged"
    command = ["--peft-path", str(folder), "--out", str(out)]

    with pytest.raises(SystemExit, match="--allow-personal exports it all the same"):
        main(command)
    assert not out.exists()
    main([*command, "--allow-personal"])

    assert "Not private" in (out / "README.md").read_text()
    assert (out / "model.safetensors").is_file()


def test_the_shared_adapter_of_a_node_needs_no_flag(
    tiny_chat_llama, tmp_path, monkeypatch
):
    monkeypatch.setenv("FEDLLM_HOME", str(tmp_path / "home"))
    node = {"data-path": write_rows(tmp_path / "own.jsonl", 60)}
    delivery = deliver_to(tiny_chat_llama, node)

    main(["--peft-path", str(delivery.folder / "shared"), "--out", str(tmp_path / "m")])

    assert (tmp_path / "m/model.safetensors").is_file()


@pytest.mark.parametrize("saved", [torch.float16, torch.float32])
def test_a_base_in_another_type_than_the_computation_s_loses_no_digit(
    saved, tiny_chat_llama, tmp_path, monkeypatch
):
    monkeypatch.setenv("FEDLLM_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(loading, "compute_dtype", lambda device: torch.bfloat16)
    name = str(tmp_path / "base")
    shutil.copytree(tiny_chat_llama, name)
    base = AutoModelForCausalLM.from_pretrained(name, dtype=saved)
    base.save_pretrained(name)
    folder, out = make_adapter(tmp_path / "peft", name, "lora"), tmp_path / "merged"

    main(["--peft-path", str(folder), "--out", str(out)])

    merged = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    for part in ("lm_head.weight", "model.layers.0.mlp.up_proj.weight"):
        assert torch.equal(merged.get_parameter(part), base.get_parameter(part).float())


def test_the_tokenizer_of_an_adapter_goes_with_the_merged_model(
    tiny_chat_llama, tmp_path, monkeypatch
):
    monkeypatch.setenv("FEDLLM_HOME", str(tmp_path / "home"))
    folder = make_adapter(tmp_path / "peft", str(tiny_chat_llama), "lora")
    (folder / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    out = tmp_path / "merged"

    main(["--peft-path", str(folder), "--out", str(out)])

    template = load_tokenizer(str(out)).chat_template
    assert template == "{{ messages[0]['content'] }}"
