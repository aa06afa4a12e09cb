"""Each thing that is wrong is found, with a remedy."""

import pytest

from fedllm.deployment import preflight
from fedllm.errors import ModelError
from tests.helpers.doctor import examined, free_port


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("data", {"data.name": "/nowhere/rows.jsonl"}),
        ("data", {"data.prompt-column": "nothing"}),
        ("data", {"data.public-test": "/nowhere/test.jsonl"}),
        ("model", {"model.name": "/nowhere/model"}),
        ("adapter", {"adapter.target-modules": "no_such_layer"}),
        ("model", {"model.name": "nobody/such-model"}),
    ],
)
def test_what_the_config_names_and_is_not_there_is_found(capsys, typed, name, change):
    status, checks = examined(capsys, {**typed, **change})

    assert status == 1
    assert checks[name]["level"] == "FAIL"
    assert len(checks[name]["text"] + checks[name]["remedy"]) > 40


def test_a_hub_that_does_not_answer_is_a_failure_within_seconds(
    capsys, typed, monkeypatch
):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{free_port()}")
    status, checks = examined(capsys, {**typed, "model.name": "some/model"})

    assert status == 1
    assert "out of reach" in checks["model"]["text"] and checks["model"]["remedy"]
    assert checks["memory"]["level"] == "note"


@pytest.mark.parametrize(
    ("version", "words"), [("0.0.1", "is 0.0.1, not"), (None, "is missing")]
)
def test_wrong_and_missing_packages_are_named(
    capsys, typed, monkeypatch, version, words
):
    real = preflight.metadata.version

    def told(name):
        if name != "peft":
            return real(name)
        if version is None:
            raise preflight.metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(preflight.metadata, "version", told)
    status, checks = examined(capsys, typed)

    assert status == 1
    assert f"peft {words}" in checks["packages"]["text"]
    assert "pip install" in checks["packages"]["remedy"]


def test_a_broken_4_bit_backend_is_found(capsys, typed, monkeypatch):
    def broken(bits, device):
        raise ModelError("bitsandbytes fails: set model.quantization=0")

    monkeypatch.setattr("fedllm.models.quantization.try_quantization", broken)

    assert examined(capsys, typed)[0] == 1
    assert examined(capsys, {**typed, "model.quantization": 0})[0] == 0


@pytest.mark.parametrize(
    ("free", "level"), [(1e12, "ok"), (3e9, "warn"), (1e6, "FAIL")]
)
def test_memory_is_held_against_the_need(capsys, typed, monkeypatch, free, level):
    monkeypatch.setattr(preflight, "_free_memory", lambda device: free)
    large = {"train.batch-size": 4096, "train.gradient-checkpointing": False}
    _, checks = examined(capsys, {**typed, **large})

    assert checks["memory"]["level"] == level
    assert bool(checks["memory"]["remedy"]) == (level != "ok")


def test_a_full_disk_is_found(capsys, typed, monkeypatch):
    usage = preflight.shutil.disk_usage("/")._replace(free=10**6)
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda path: usage)
    status, checks = examined(capsys, typed)

    assert status == 1 and "FEDLLM_HOME" in checks["disk"]["remedy"]
