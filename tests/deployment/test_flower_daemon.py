"""A daemon that `flwr run` would join is found."""

import os
import subprocess
import sys

import pytest

from fedllm.deployment import flower_daemon
from tests.helpers.doctor import examined

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
