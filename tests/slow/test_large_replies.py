"""A reply that swells when it is read, against a server whose memory is limited."""

import contextlib
import os
import re
import signal
import threading

import psutil
import pytest

from tests.slow.flower_processes import BIN, typed
from tests.slow.test_hostile_clients import UNITS, hostile_app, settings
from tests.slow.test_real_faults import RESUME, Deployment, wait_until
from tests.test_federation import write_rows

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

# From five megabytes on the wire, more than any limit below.
SWOLLEN = "12000"
ROUNDS = 3


class Attacked(Deployment):
    """A server, honest nodes, and one that sends a swelling reply from round 2 on."""

    def __init__(self, tmp_path, base):
        super().__init__(tmp_path, base)
        self.env["FEDLLM_TEST_REPLY_MEGABYTES"] = os.environ.get(
            "FEDLLM_TEST_REPLY_MEGABYTES", SWOLLEN
        )
        self.app = hostile_app(tmp_path / "app")

    def attacker(self):
        rows = write_rows(self.tmp / "attacker.jsonl", 12, 500)
        return self.node_of(
            f'data-path="{rows}" attacker=0 attack="swelling" attack-from=2'
        )

    def start(self, config):
        command = [str(BIN / "flwr"), "run", str(self.app), "remote"]
        done = typed([*command, "--run-config", config], self.env, 120)
        assert done.returncode == 0, done.stdout + done.stderr

    def run_config(self):
        return settings(
            self.base,
            self.tmp,
            **UNITS["client"],
            **{
                "num-server-rounds": ROUNDS,
                "strategy.num-clients": 3,
                "strategy.round-timeout": 60.0,
            },
        )

    def peak(self):
        """Largest resident size of the ServerApp so far, in bytes."""
        sizes = [0]
        for pid in self.processes("flwr-serverapp"):
            with contextlib.suppress(psutil.Error):
                sizes.append(psutil.Process(pid).memory_info().rss)
        return max(sizes)


@pytest.fixture
def attacked(tmp_path, tiny_llama):
    return Attacked(tmp_path, tiny_llama)


def test_under_a_limit_of_memory_a_swelling_reply_counts_as_zero(attacked):
    d = attacked
    peaks = []
    with d.superlink(limit_kb=8_000_000), d.node(0), d.node(1), d.attacker():
        d.start(d.run_config())
        wait_until(lambda: peaks.append(d.peak()) or d.finished(), 300)

    told = (d.tmp / "superlink.log").read_text()
    refused = re.findall(r"round (\d): node \d+: no usable update \(code (\S+)\)", told)
    assert refused == [(str(n), "malformed") for n in range(2, ROUNDS + 1)]
    assert d.usable() == [3, 2, 2]
    assert d.privacy()["releases"] == list(range(1, ROUNDS + 1))
    assert 2**30 < max(peaks) < 8e9


def test_a_server_that_a_swelling_reply_killed_goes_on_without_its_sender(attacked):
    d = attacked
    limit = 3 * 2**30
    stop = threading.Event()

    def kill_what_passes_the_limit():
        """As the system does with a container."""
        while not stop.wait(0.05):
            for pid in d.processes("flwr-serverapp"):
                with contextlib.suppress(psutil.Error, ProcessLookupError):
                    if psutil.Process(pid).memory_info().rss > limit:
                        os.kill(pid, signal.SIGKILL)
                        killed.append(pid)

    killed: list[int] = []
    watch = threading.Thread(target=kill_what_passes_the_limit)
    watch.start()
    try:
        with d.superlink(), d.node(0), d.node(1):
            with d.attacker():
                d.start(d.run_config())
                wait_until(lambda: killed)
            folder, before = d.run, d.privacy()
            assert before["releases"] == [1] and not d.finished()
            with d.node(2):
                d.start(RESUME)
                wait_until(d.finished)
    finally:
        stop.set()
        watch.join()

    told = d.privacy()
    assert d.run == folder
    # Round 2 was asked for, but neither paid for nor released when the server died.
    assert told["releases"] == [1, 2, 3]
    assert told["epsilon"] > before["epsilon"]
    assert d.usable() == [3, 3, 3]
