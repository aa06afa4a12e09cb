"""Processes killed and stopped in a real federation on loopback."""

import signal
import subprocess
import sys

import pytest

from tests.helpers.flower_processes import RESUME, ROOT, Deployment, typed, wait_until
from tests.helpers.rows import write_rows

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


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
    simulate = [sys.executable, "-m", "fedllm.commands.main", "simulate"]
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
