"""The doctor: each thing that is wrong is found, with a remedy, and nothing is fetched."""

import json
import os
import socket
import subprocess
import sys

import pytest

from fedllm.commands import doctor
from fedllm.deployment import flower_daemon, preflight
from fedllm.errors import ModelError
from tests.test_federation import write_rows


@pytest.fixture
def typed(tiny_llama, tmp_path, monkeypatch):
    """A config that this machine can run."""
    monkeypatch.setenv("FEDLLM_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(flower_daemon, "FLOWER_PORT", free_port())
    rows = write_rows(tmp_path / "rows.jsonl", 4)
    return {
        "model.name": str(tiny_llama),
        "model.quantization": 4,
        "data.name": rows,
    }


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def examined(capsys, typed):
    """Return the exit status, and the checks by name."""
    pairs = " ".join(f"{k}={json.dumps(v)}" for k, v in typed.items())
    with pytest.raises(SystemExit) as stopped:
        doctor.main(["--json", "--run-config", pairs])
    content = json.loads(capsys.readouterr().out)
    assert content["ready"] == (stopped.value.code == 0)
    return stopped.value.code, {check["name"]: check for check in content["checks"]}


def test_a_machine_that_can_run_it_is_told_so(capsys, typed):
    status, checks = examined(capsys, typed)

    assert status == 0
    assert {check["level"] for check in checks.values()} <= {"ok", "note"}
    assert "4 bit works" in checks["quantisation"]["text"]
    assert "4 of 4 rows" in checks["data"]["text"]
    assert not os.path.exists(os.environ["FEDLLM_HOME"])


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("data", {"data.name": "/nowhere/rows.jsonl"}),
        ("data", {"data.prompt-column": "nothing"}),
        ("data", {"data.public-test": "/nowhere/test.jsonl"}),
        ("model", {"model.name": "/nowhere/model"}),
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


def test_quantisation_that_gives_wrong_values_is_refused(monkeypatch):
    from bitsandbytes import functional

    from fedllm.models.quantization import try_quantization

    try_quantization(4, "cpu")
    try_quantization(8, "cpu")
    monkeypatch.setattr(functional, "dequantize_4bit", lambda q, s: q.float().mean())
    with pytest.raises(ModelError, match="wrong values"):
        try_quantization(4, "cpu")


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


LISTENS = (
    "import socket, sys, time\n"
    "s = socket.socket()\n"
    "s.bind(('127.0.0.1', int(sys.argv[1])))\n"
    "s.listen()\n"
    "print('up', flush=True)\n"
    "time.sleep(60)\n"
)


@pytest.mark.parametrize(("home", "level"), [(None, "ok"), ("/elsewhere", "warn")])
def test_a_daemon_that_flwr_run_would_join_is_named_with_its_environment(
    capsys, typed, home, level
):
    port = flower_daemon.FLOWER_PORT
    env = {**os.environ, "SECRET_TOKEN": "hush"}
    env |= {} if home is None else {"FEDLLM_HOME": home}
    with subprocess.Popen(
        [sys.executable, "-c", LISTENS, str(port)], env=env, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout.readline() == b"up\n"
        status, checks = examined(capsys, typed)
        process.kill()

    daemon = checks["Flower daemon"]
    assert status == 0 and daemon["level"] == level
    assert f"process {process.pid}, {sys.executable}" in daemon["text"]
    assert "hush" not in daemon["text"]
    assert (str(process.pid) in daemon["remedy"]) == (level == "warn")


def test_a_bad_config_is_all_that_is_said(capsys):
    with pytest.raises(SystemExit, match="FAIL  config: train.batch-size") as stopped:
        doctor.main(["--run-config", "train.batch-size=0 privacy.delta=2.0"])

    assert len(str(stopped.value.code).splitlines()) == 2


def test_a_screen_for_a_person_has_a_remedy_below_what_failed(capsys, typed):
    pairs = f"model.name='/nowhere' data.name='{typed['data.name']}'"
    with pytest.raises(SystemExit) as stopped:
        doctor.main(["--run-config", pairs])
    lines = capsys.readouterr().out.splitlines()

    assert stopped.value.code == 1
    assert len(lines) <= 24
    assert any(line.startswith("FAIL  model: /nowhere") for line in lines)
    assert lines[-1].endswith("checks failed")
