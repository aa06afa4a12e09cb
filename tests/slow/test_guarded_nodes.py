"""Real nodes that run what their owners chose, and nothing else."""

import contextlib
import json
import shutil
import sys

import pytest

from fedllm.node.log import check_log, read_lines
from tests.helpers.flower_processes import (
    BIN,
    ROOT,
    Deployment,
    free_port,
    running,
    typed,
    wait_until,
)
from tests.helpers.rows import write_rows

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
FEDLLM = [sys.executable, "-m", "fedllm.commands.main"]


def test_a_node_answers_its_own_app_and_refuses_a_changed_one(tiny_llama, tmp_path):
    here = Deployment(tmp_path, tiny_llama)
    changed = tmp_path / "app"
    changed.mkdir()
    shutil.copytree(ROOT / "fedllm", changed / "fedllm")
    for name in ("pyproject.toml", "LICENSE"):
        shutil.copy(ROOT / name, changed)
    marker = tmp_path / "imported"
    with (changed / "fedllm" / "client_app.py").open("a") as file:
        file.write(f"\nopen({str(marker)!r}, 'a').write('x')\n")
    heads = [tmp_path / f"head-{index}" for index in (0, 1)]
    homes = [tmp_path / f"home-{index}" for index in (0, 1)]
    with contextlib.ExitStack() as stack:
        stack.enter_context(here.superlink())
        for index, (home, head) in enumerate(zip(homes, heads, strict=True)):
            rows = write_rows(tmp_path / f"hospital-{index}.jsonl", 12, 12 * index)
            command = [*FEDLLM, "supernode", "--insecure", "--home", str(home)]
            command += ["--superlink", f"127.0.0.1:{here.port}"]
            command += ["--port", str(free_port()), "--log-head", str(head)]
            command += ["--node-config", f'data-path="{rows}"']
            env = here.env | {"PYTHONPATH": str(ROOT)}
            stack.enter_context(running(command, env, tmp_path / f"node-{index}.log"))
        config = here.config(**{"num-server-rounds": 1, "privacy.unit": "none"})
        run = [str(BIN / "flwr"), "run", str(ROOT), "remote", "--run-config", config]
        assert typed(run, here.env, 120).returncode == 0
        wait_until(here.finished, 120)
        assert here.usable() == [2]

        run[2] = str(changed)
        assert typed(run, here.env, 120).returncode == 0
        wait_until(lambda: all('"not-approved"' in log_of(home) for home in homes), 120)
    # The ServerApp imports the changed package; no node does.
    nodes = [(tmp_path / f"node-{index}.log").read_text() for index in (0, 1)]
    for home, head, said in zip(homes, heads, nodes, strict=True):
        assert check_log(home / "node" / "node.log", head.read_text()).number >= 4
        lines = list(read_lines(home / "node" / "node.log"))
        assert lines[0]["refused"] is None and lines[1]["num_bytes"] > 0
        assert "client_app.py" in lines[-2]["refused"]
        assert lines[-1]["code"] == "not-approved" and lines[-1]["num_bytes"] == 0
        assert "clients are forked by process" in said
    assert not marker.exists()
    assert json.loads(json.dumps(lines))


def log_of(home) -> str:
    path = home / "node" / "node.log"
    return path.read_text() if path.exists() else ""
