import logging
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from fedllm.errors import ModelError
from fedllm.models import loading, location
from fedllm.models.loading import load_base, load_tokenizer
from fedllm.models.location import base_digest, locate
from tests.helpers.passes import _logits


def test_the_tokenizer_pads_with_the_end_of_text_if_it_has_no_padding_token(
    tiny_llama: Path,
) -> None:
    tokenizer: Any = load_tokenizer(str(tiny_llama))

    assert tokenizer.chat_template is None
    assert tokenizer.pad_token == tokenizer.eos_token == "</s>"
    assert tokenizer.padding_side == "right"
    text = "What is a vaccine? Ünknown letters too."
    assert tokenizer.decode(tokenizer(text)["input_ids"][1:]) == text


def test_a_chat_template_survives_saving(tiny_chat_llama: Path, tmp_path: Path) -> None:
    load_tokenizer(str(tiny_chat_llama)).save_pretrained(tmp_path)

    prompt = load_tokenizer(str(tmp_path)).apply_chat_template(
        [{"role": "user", "content": "Hello"}],
        tokenize=False,
        add_generation_prompt=True,
    )

    assert prompt == "<|user|>\nHello</s>\n<|assistant|>\n"


def test_a_tokenizer_without_an_end_of_text_raises_an_error(own_llama: Path) -> None:
    file = own_llama / "tokenizer_config.json"
    file.write_text(file.read_text().replace('"</s>"', "null"))

    with pytest.raises(ModelError, match="eos_token"):
        load_tokenizer(str(own_llama))


@pytest.mark.parametrize("quantization", [0, 4, 8])
def test_the_base_is_frozen_and_carries_the_name_of_the_model(
    tiny_llama: Path, tmp_path: Path, quantization: int
) -> None:
    for _ in range(2):
        model: Any = load_base(str(tiny_llama), quantization, tmp_path, "cpu")

        assert not any(p.requires_grad for p in model.parameters())
        assert not model.training
        assert model.config.use_cache is False
        assert model.name_or_path == model.config._name_or_path == str(tiny_llama)
        assert model.dtype == loading.compute_dtype("cpu")


@pytest.mark.parametrize("quantization", [4, 8])
def test_a_second_load_takes_the_quantised_weights_from_disk(
    tiny_llama: Path,
    tmp_path: Path,
    quantization: int,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "fedllm.models.loading")
    first = load_base(str(tiny_llama), quantization, tmp_path, "cpu")
    said = len(caplog.records)

    second = load_base(str(tiny_llama), quantization, tmp_path, "cpu")

    assert said == len(caplog.records) == 1
    assert torch.equal(_logits(first), _logits(second))
    plain = load_base(str(tiny_llama), 0, tmp_path, "cpu")
    assert not torch.equal(_logits(first), _logits(plain))


def test_a_changed_model_is_quantised_anew(own_llama: Path, tmp_path: Path) -> None:
    before = _logits(load_base(str(own_llama), 4, tmp_path, "cpu"))
    changed = AutoModelForCausalLM.from_pretrained(own_llama)
    changed.model.layers[0].mlp.up_proj.weight.data.mul_(3)
    changed.save_pretrained(own_llama)

    assert not torch.equal(
        before, _logits(load_base(str(own_llama), 4, tmp_path, "cpu"))
    )


def test_a_full_disk_costs_the_cache_and_not_the_run(
    tiny_llama: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    from transformers import PreTrainedModel

    def save_pretrained(*_: object, **__: object) -> None:
        raise OSError(28, os.strerror(28))

    expected = _logits(load_base(str(tiny_llama), 4, tmp_path / "roomy", "cpu"))
    monkeypatch.setattr(PreTrainedModel, "save_pretrained", save_pretrained)

    model = load_base(str(tiny_llama), 4, tmp_path, "cpu")

    assert torch.equal(_logits(model), expected)
    assert "no space left" in caplog.text
    cache = tmp_path / "quantised"
    assert [path for path in cache.iterdir() if path.is_dir()] == []


def test_a_home_that_cannot_be_written_to_costs_the_cache_and_not_the_run(
    tiny_llama: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "home").write_text("a file where the folder should be")

    load_base(str(tiny_llama), 4, tmp_path / "home", "cpu")

    assert "cannot be kept" in caplog.text


def test_cpus_compute_in_bfloat16_only_if_they_multiply_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for features, dtype in [
        ({"avx512_bf16": True}, torch.bfloat16),
        ({"amx_bf16": True}, torch.bfloat16),
        ({"avx2": True, "avx512_bf16": False}, torch.float32),
        ({}, torch.float32),
    ]:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda f=features: f)
        assert loading.compute_dtype("cpu") == dtype


def test_a_model_from_bfloat16_files_gives_the_logits_that_were_saved(
    tiny_llama: Path, tmp_path: Path
) -> None:
    saved = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.bfloat16)
    saved.save_pretrained(tmp_path / "saved")

    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "saved", dtype=torch.bfloat16
    )

    assert torch.equal(_logits(saved), _logits(loaded))


COMMITS = ("a" * 40, "b" * 40)


@pytest.fixture
def hub(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A hub's cache with two commits of one model; main is the second."""
    import huggingface_hub.constants

    cache = tmp_path / "hub"
    repository = cache / "models--owner--base"
    for number, commit in enumerate(COMMITS):
        folder = repository / "snapshots" / commit
        shutil.copytree(tiny_llama, folder)
        model: Any = AutoModelForCausalLM.from_pretrained(tiny_llama)
        model.lm_head.weight.data.add_(number)
        model.save_pretrained(folder)
        (folder / "chat_template.jinja").write_text(f"template {number}")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMITS[1])
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    location.commit_of.cache_clear()
    return "owner/base"


@pytest.mark.parametrize(("pin", "number"), [("", 1), (COMMITS[0], 0), (COMMITS[1], 1)])
def test_config_weights_and_tokenizer_are_of_the_commit_that_is_named(
    hub: str, tiny_llama: Path, tmp_path: Path, pin: str, number: int
) -> None:
    location = locate(f"{hub}@{pin}" if pin else hub, tmp_path)
    model: Any = load_base(location, 0, tmp_path, "cpu", in_float32=True)
    first: Any = load_base(str(tiny_llama), 0, tmp_path, "cpu", in_float32=True)

    moved = model.lm_head.weight - first.lm_head.weight
    assert torch.allclose(moved, torch.full_like(moved, float(number)))
    assert load_tokenizer(location).chat_template == f"template {number}"
    assert base_digest(location, tmp_path) == f"{hub} {COMMITS[number]}"
    assert model.name_or_path == location


def test_weights_that_are_no_safetensors_are_not_loaded(
    own_llama: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    weights = own_llama / "model.safetensors"
    torch.save(load_file(weights), own_llama / "pytorch_model.bin")
    weights.unlink()

    with pytest.raises(ModelError, match="has no weights in safetensors"):
        load_base(str(own_llama), 0, tmp_path, "cpu")


def test_a_cached_model_that_another_user_changed_is_not_loaded(
    tiny_llama: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny_llama, tmp_path / "models" / "base"))
    load_base(str(folder), 4, tmp_path, "cpu")
    (copy,) = (tmp_path / "quantised").glob("base-4bit-*")
    weights = copy / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)

    with pytest.raises(ModelError, match="quantised/.*has changed since it was made"):
        load_base(str(folder), 4, tmp_path, "cpu")
