"""Beside a SuperNode: each delivery is trained once, and all ends with the SuperNode."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from fedllm.deployment import personal_watch
from fedllm.deployment.personal_watch import watch
from fedllm.deployment.supernode import start_helper
from fedllm.errors import NodeError


def delivery(folder: Path, run: int, client: int, *, trained: bool = False):
    where = folder / f"{run}-{client}"
    (where / "personal" if trained else where).mkdir(parents=True)
    node = SimpleNamespace(partition_id=client)
    return SimpleNamespace(run_id=run, node=node, folder=where)


@pytest.fixture
def supernode():
    """A pipe that stands for a SuperNode: closing its second end ends it."""
    ended, alive = os.pipe()
    yield SimpleNamespace(ended=ended, end=lambda: os.close(alive))
    os.close(ended)


def note(path: Path, then: str = "") -> tuple[str, ...]:
    """Return a command that notes what it is to train."""
    script = (
        f"import sys, time; open({str(path)!r}, 'a').write(sys.argv[1] + '\\n');{then}"
    )
    return (sys.executable, "-S", "-c", script)


def wait_until(condition) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def test_each_delivery_without_a_personal_adapter_is_trained_once(
    supernode, tmp_path, monkeypatch
):
    notes = tmp_path / "notes"
    here = [delivery(tmp_path, 1, 0, trained=True), delivery(tmp_path, 1, 3)]
    looks = []

    def found():
        looks.append(1)
        return list(here)

    monkeypatch.setattr(personal_watch, "deliveries", found)
    watching = threading.Thread(
        target=watch, args=(supernode.ended, note(notes), 0.02), daemon=True
    )
    watching.start()
    wait_until(lambda: lines(notes) == ["1/client-3"])
    # What failed, or what was just begun, is not tried again; what is new is.
    here.append(delivery(tmp_path, 2, 3))
    seen = len(looks)
    wait_until(lambda: len(lines(notes)) == 2 and len(looks) > seen + 5)
    supernode.end()
    watching.join(30)

    assert not watching.is_alive()
    assert lines(notes) == ["1/client-3", "2/client-3"]


def test_a_training_ends_with_the_supernode(supernode, tmp_path, monkeypatch):
    notes = tmp_path / "notes"
    here = [delivery(tmp_path, 1, 3), delivery(tmp_path, 1, 4)]
    monkeypatch.setattr(personal_watch, "deliveries", lambda: here)
    endless = note(notes, "time.sleep(600)")
    watching = threading.Thread(
        target=watch, args=(supernode.ended, endless, 0.02), daemon=True
    )
    watching.start()
    wait_until(lambda: lines(notes))
    began = time.monotonic()
    supernode.end()
    watching.join(30)

    assert not watching.is_alive() and time.monotonic() - began < 20
    assert lines(notes) == ["1/client-3"]


def test_a_damaged_folder_costs_one_line_and_no_end(
    supernode, tmp_path, monkeypatch, caplog
):
    looks = []

    def damaged():
        looks.append(1)
        if len(looks) > 5:
            supernode.end()
        raise NodeError("personal/1: cannot be read")

    monkeypatch.setattr(personal_watch, "deliveries", damaged)
    watch(supernode.ended, note(tmp_path / "notes"), 0.02)

    assert len(looks) > 5
    assert caplog.text.count("cannot be read") == 1


def test_the_helper_ends_when_the_program_that_started_it_ends(tmp_path):
    script = (
        "import sys; from fedllm.deployment.supernode import start_helper\n"
        "from fedllm.deployment.personal_watch import PERSONAL_WATCH_COMMAND\n"
        "print(start_helper(PERSONAL_WATCH_COMMAND).pid, flush=True); sys.stdin.read(1)"
    )
    environment = {**os.environ, "FEDLLM_HOME": str(tmp_path / "home")}
    program = subprocess.Popen(
        [sys.executable, "-c", script],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert program.stdout is not None and program.stdin is not None
    pid = int(program.stdout.readline())

    def is_there() -> bool:
        stat = Path(f"/proc/{pid}/stat")
        return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"

    time.sleep(0.5)
    assert is_there()
    with program:
        program.stdin.close()
    wait_until(lambda: not is_there())


def test_a_helper_that_cannot_be_started_leaves_no_descriptor(tmp_path):
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(OSError, match="No such file"):
        start_helper((str(tmp_path / "missing"),))
    assert len(os.listdir("/proc/self/fd")) == before
