"""The doctor's checks by name, and a free port."""

import json
import socket

from fedllm.commands import doctor
from tests.helpers.commands import exit_status


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def examined(capsys, typed):
    """Return the exit status, and the checks by name."""
    pairs = " ".join(f"{k}={json.dumps(v)}" for k, v in typed.items())
    status = exit_status(doctor.main, ["--json", "--run-config", pairs])
    content = json.loads(capsys.readouterr().out)
    assert content["ready"] == (status == 0)
    return status, {check["name"]: check for check in content["checks"]}
