"""Real Flower processes on loopback, each ended by the code that started it."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil

from tests.helpers.rows import write_rows

ROOT = Path(__file__).parent.parent.parent
BIN = Path(sys.executable).parent


# In the background of a shell interrupts are ignored, and so they would be by whatever
# the tests start there and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)


def environment(flwr_home: Path, fedllm_home: Path) -> dict[str, str]:
    """An environment that shares nothing with the user's Flower."""
    return {
        **os.environ,
        "FLWR_HOME": str(flwr_home),
        "FEDLLM_HOME": str(fedllm_home),
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_TELEMETRY_ENABLED": "0",
        "HF_HUB_OFFLINE": "1",
        "RAY_raylet_start_wait_time_s": "120",
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        "COLUMNS": "200",
    }


def typed(
    command: list[str], env: dict[str, str], seconds: float = 900
) -> "subprocess.CompletedProcess[str]":
    """Run a command in the project's folder as a user would, whatever its status."""
    return subprocess.run(
        command,
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def running(command: list[str], env: dict[str, str], log: Path) -> Iterator[None]:
    """Run a process, and end it and what it started at the end."""
    with log.open("w") as output:
        process = subprocess.Popen(
            command, env=env, stdout=output, stderr=output, start_new_session=True
        )
    try:
        yield
    finally:
        for sign in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
                os.killpg(process.pid, sign)
                process.wait(timeout=20)
                # What it started ends after it, and leaves no file behind.
                deadline = time.monotonic() + 5
                while time.monotonic() < deadline:
                    os.killpg(process.pid, 0)
                    time.sleep(0.05)


def wait_for_port(port: int, seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        with (
            contextlib.suppress(OSError),
            socket.create_connection(("127.0.0.1", port), 1),
        ):
            return
        time.sleep(0.2)
    raise AssertionError(f"nothing listens on {port}")


def wait_until(condition: Callable[[], Any], seconds: float = 480) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.1)


def end_daemon(flwr_home: Path) -> None:
    """End the SuperLink that `flwr run` left, told by its Flower home."""
    wanted = f"FLWR_HOME={flwr_home}".encode()
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            started_by_us = wanted in (folder / "environ").read_bytes().split(b"\0")
            name = (folder / "cmdline").read_bytes()
            if started_by_us and b"flower-superlink" in name:
                os.kill(int(folder.name), signal.SIGTERM)


def processes_of(fedllm_home: Path) -> list[str]:
    """Return what runs with this home in its environment, but for this process."""
    wanted = f"FEDLLM_HOME={fedllm_home}"
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if wanted in (f"{k}={v}" for k, v in process.environ().items()):
                found.append(" ".join(process.cmdline()))
    return found


def readme_command(heading: str) -> str:
    """Return the first bash block under a README heading: one line."""
    text = (ROOT / "README.md").read_text("utf-8").split(f"## {heading}\n", 1)[1]
    block = text.split("```bash\n", 1)[1].split("```", 1)[0].strip()
    assert "\n" not in block
    return block


def latest_run(fedllm_home: Path) -> Path:
    return (fedllm_home / "runs" / "latest").resolve()


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
        return self.node_of(f'data-path="{rows}"')

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
            "train.local-steps": 1,
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
