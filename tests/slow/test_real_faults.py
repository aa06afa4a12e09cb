"""Processes killed and stopped in a real federation on loopback."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.slow.flower_processes import (
    BIN,
    ROOT,
    environment,
    free_port,
    latest_run,
    running,
    typed,
    wait_for_port,
    wait_until,
)
from tests.test_federation import write_rows

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

RESUME = 'resume.from="latest"'


class Deployment:
    """A SuperLink on a database, and SuperNodes with files of their own."""

    def __init__(self, tmp_path: Path, base: Path) -> None:
        self.tmp = tmp_path
        self.base = base
        self.env = environment(tmp_path / "flwr", tmp_path / "fedllm") | {
            "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
            "OMP_NUM_THREADS": "1",
        }
        self.port = free_port()
        (tmp_path / "flwr").mkdir()
        (tmp_path / "flwr" / "config.toml").write_text(
            f'[superlink.remote]\naddress = "127.0.0.1:{self.port}"\ninsecure = true\n'
        )

    @contextlib.contextmanager
    def superlink(
        self, name: str = "superlink", limit_kb: int | None = None
    ) -> Iterator[None]:
        """Run the server; the limit is one of address space, for each process."""
        command = [str(BIN / "flower-superlink"), "--insecure"]
        if limit_kb:
            limited = f'ulimit -v {limit_kb}; exec "$@"'
            command = ["bash", "-c", limited, "bash", *command]
        command += ["--port", str(self.port)]
        command += ["--database", str(self.tmp / "state.db")]
        with running(command, self.env, self.tmp / f"{name}.log"):
            wait_for_port(self.port)
            yield

    def node(self, index: int) -> contextlib.AbstractContextManager[None]:
        rows = write_rows(self.tmp / f"hospital-{index}.jsonl", 12, 12 * index)
        return self.node_of(f'data-path="{rows}" name-of-node={index}')

    def node_of(self, own: str) -> contextlib.AbstractContextManager[None]:
        """Run a SuperNode with this config."""
        name = f"node-{len(list(self.tmp.glob('node-*.log')))}"
        command = [str(BIN / "flower-supernode"), "--insecure"]
        command += ["--superlink", f"127.0.0.1:{self.port}"]
        command += ["--port", str(free_port()), "--node-config", own]
        return running(command, self.env, self.tmp / f"{name}.log")

    def begin(self, run_config: str | None = None, **more: object) -> str:
        """Start a run and return at once."""
        text = run_config or self.config(**more)
        command = [str(BIN / "flwr"), "run", ".", "remote", "--run-config", text]
        done = typed(command, self.env, 120)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def config(self, **more: object) -> str:
        """The run config as it is typed."""
        values = {
            "model.name": str(self.base),
            "data.name": str(self.tmp / "hospital-0.jsonl"),
            "model.quantization": 0,
            "strategy.num-clients": 2,
            "strategy.evaluate-examples": 0,
            "train.batch-size": 4,
            **more,
        }
        return " ".join(f"{k}={json.dumps(v)}" for k, v in values.items())

    @property
    def run(self) -> Path:
        return latest_run(self.tmp / "fedllm")

    def lines(self) -> list[dict[str, Any]]:
        path = self.run / "metrics.jsonl"
        if not path.exists():
            return []
        return [json.loads(line) for line in path.read_text().splitlines()]

    def usable(self) -> list[int]:
        """How many clients counted in each round."""
        return [x["clients_answered"] - x["clients_rejected"] for x in self.lines()[1:]]

    def finished(self) -> bool:
        return (self.run / "README.md").exists()

    def privacy(self) -> dict[str, Any]:
        return dict(json.loads((self.run / "privacy.json").read_text()))

    def processes(self, program: str, says: str = "") -> list[int]:
        """Ids of this deployment's processes of a program."""
        wanted = f"FLWR_HOME={self.tmp / 'flwr'}".encode()
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if wanted in (folder / "environ").read_bytes().split(b"\0"):
                    line = (folder / "cmdline").read_bytes().decode()
                    if program in line and says in line:
                        found.append(int(folder.name))
        return found

    def kill(self, program: str, sign: signal.Signals, says: str = "") -> None:
        pids = self.processes(program, says)
        assert pids, f"no {program}"
        for pid in pids:
            os.kill(pid, sign)


@pytest.fixture
def deployment(tmp_path, tiny_llama):
    return Deployment(tmp_path, tiny_llama)


def test_a_server_app_that_is_killed_is_resumed_under_the_same_epsilon(deployment):
    d = deployment
    with d.superlink(), d.node(0), d.node(1):
        d.begin(**{"num-server-rounds": 3})
        wait_until(lambda: len(d.lines()) >= 2)
        folder = d.run
        d.kill("flwr-serverapp", signal.SIGKILL)
        wait_until(lambda: not d.processes("flwr-serverapp"))
        paid = d.privacy()["releases"]
        assert paid and not d.finished()
        d.begin(RESUME)
        wait_until(d.finished)

    told = d.privacy()
    assert d.run == folder
    assert told["releases"] == [1, 2, 3]
    assert told["releases"][: len(paid)] == paid
    assert 7.9 < told["epsilon"] <= 8.0
    assert all(line["clients_rejected"] == 0 for line in d.lines())
    assert (folder / "peft_final" / "adapter_model.safetensors").exists()


def test_a_superlink_that_is_killed_takes_the_run_along_and_resuming_repairs_it(
    deployment,
):
    d = deployment
    with d.node(0), d.node(1):
        with d.superlink():
            d.begin(**{"num-server-rounds": 3})
            wait_until(lambda: len(d.lines()) >= 2)
            folder = d.run
            d.kill("flower-superlink", signal.SIGKILL)
        with d.superlink("superlink-again"):
            # Flower stops the ServerApp of a SuperLink that is gone, and its process
            # waits for one to report that to.
            wait_until(lambda: not d.processes("flwr-serverapp"))
            paid = d.privacy()["releases"]
            assert not d.finished()
            d.begin(RESUME)
            wait_until(d.finished)

    told = d.privacy()
    assert d.run == folder
    assert told["releases"][: len(paid)] == paid
    assert told["releases"] == [1, 2, 3]
    assert told["epsilon"] <= 8.0
    assert d.lines()[-1]["clients_answered"] == 2


def test_a_simulation_that_is_cut_off_goes_on_in_another_one(deployment):
    d = deployment
    write_rows(d.tmp / "hospital-0.jsonl", 12)
    simulate = [sys.executable, "-m", "fedllm.commands.simulate"]
    simulate += ["--num-supernodes", "3", "--run-config"]
    begun = subprocess.Popen(
        [*simulate, d.config(**{"num-server-rounds": 3, "strategy.num-clients": 3})],
        cwd=ROOT,
        env=d.env,
        stdout=subprocess.DEVNULL,
    )
    try:
        wait_until(lambda: len(d.lines()) >= 2)
    finally:
        begun.send_signal(signal.SIGINT)
        begun.wait(timeout=60)
    folder, paid = d.run, d.privacy()["releases"]
    assert not d.finished()
    done = typed([*simulate, RESUME], d.env, 300)

    assert done.returncode == 0, done.stdout + done.stderr
    assert f"run folder: {folder}" in done.stdout
    told = d.privacy()
    assert told["releases"] == [1, 2, 3]
    assert told["releases"][: len(paid)] == paid
    assert d.lines()[-1]["clients_answered"] == 3
    assert d.lines()[-1]["clients_rejected"] == 0


# A message takes a client half of this on a busy machine, most of it for imports.
LIMIT = {
    "privacy.unit": "none",
    "privacy.target-epsilon": 0.0,
    "strategy.round-timeout": 40.0,
    "num-server-rounds": 9,
}


def test_a_supernode_that_is_killed_counts_zero_and_takes_part_again_once_restarted(
    deployment,
):
    d = deployment
    with d.superlink(), d.node(0):
        with d.node(1):
            d.begin(**LIMIT)
            wait_until(lambda: len(d.processes("flwr-clientapp")) == 2)
            d.kill("flower-supernode", signal.SIGKILL, says="hospital-1")
        with d.node(1):
            wait_until(lambda: 1 in d.usable())
            # Flower believes a node that was killed to be there for a minute.
            wait_until(lambda: 2 in d.usable())

    usable = d.usable()
    assert usable.index(1) < usable.index(2)


def test_a_supernode_that_hangs_past_the_time_limit_loses_its_round_only(deployment):
    d = deployment
    with d.superlink(), d.node(0), d.node(1):
        d.begin(**LIMIT)
        wait_until(lambda: len(d.processes("flwr-clientapp")) == 2)
        try:
            d.kill("flower-supernode", signal.SIGSTOP, says="hospital-1")
            wait_until(lambda: 1 in d.usable())
        finally:
            d.kill("flower-supernode", signal.SIGCONT, says="hospital-1")
        wait_until(lambda: 2 in d.usable())

    assert d.usable()[0] == 1
