"""The doctor's checks by name, and a config and a port for it."""

import json
import socket

import pytest

from fedllm.commands import doctor
from fedllm.deployment import flower_daemon
from tests.helpers.commands import exit_status
from tests.helpers.rows import write_rows


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


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


def examined(capsys, typed):
    """Return the exit status, and the checks by name."""
    pairs = " ".join(f"{k}={json.dumps(v)}" for k, v in typed.items())
    status = exit_status(doctor.main, ["--json", "--run-config", pairs])
    content = json.loads(capsys.readouterr().out)
    assert content["ready"] == (status == 0)
    return status, {check["name"]: check for check in content["checks"]}
