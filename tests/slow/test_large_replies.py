"""A reply that swells when it is read, against a server whose memory is limited."""

import contextlib
import os
import re
import signal
import threading

import psutil
import pytest

from tests.helpers.flower_processes import BIN, RESUME, Deployment, typed
from tests.helpers.hostile_app import UNITS, hostile_app, settings
from tests.helpers.rows import write_rows

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
GIGABYTE = 2**30
# More than any limit below, from five megabytes on the wire. FEDLLM_TEST_ATTACK=big sends
# what FEDLLM_TEST_REPLY_MEGABYTES says instead.
ATTACK = os.environ.get("FEDLLM_TEST_ATTACK", "swelling")
SWOLLEN = os.environ.get("FEDLLM_TEST_REPLY_MEGABYTES", "12000")
LIMIT_KB = int(os.environ.get("FEDLLM_TEST_LIMIT_KB", "6000000"))
LATER = "attack-from=2"
ROUNDS = 3
PATIENT = {"strategy.round-timeout": 120.0}


class Attacked(Deployment):
    """A server, honest nodes, and one that sends a swelling reply from round 2 on."""

    def __init__(self, tmp_path, base):
        super().__init__(tmp_path, base)
        self.env["FEDLLM_TEST_REPLY_MEGABYTES"] = SWOLLEN
        self.app = hostile_app(tmp_path / "app")

    def attacker(self):
        rows = write_rows(self.tmp / "attacker.jsonl", 12, 500)
        return self.node_of(f'data-path="{rows}" attacker=0 attack="{ATTACK}" {LATER}')

    def ended(self, config):
        """Run to the end, and return what it says."""
        command = [str(BIN / "flwr"), "run", str(self.app), "remote", "--stream"]
        return typed([*command, "--run-config", config], self.env, 500).stdout

    def run_config(self):
        more = {"num-server-rounds": ROUNDS, "strategy.num-clients": 3}
        return settings(self.base, self.tmp, **{**UNITS["client"], **more, **PATIENT})

    @contextlib.contextmanager
    def watched(self, limit):
        """Kill a ServerApp that grows past a limit, as the system does in a container.

        Yields:
            The largest size seen, and how often one was killed.
        """
        seen = {"largest": 0, "killed": 0}
        stop = threading.Event()

        def watch():
            while not stop.wait(0.05):
                for pid in self.processes("flwr-serverapp"):
                    with contextlib.suppress(psutil.Error, ProcessLookupError):
                        size = psutil.Process(pid).memory_info().rss
                        seen["largest"] = max(seen["largest"], size)
                        if size > limit:
                            os.kill(pid, signal.SIGKILL)
                            seen["killed"] += 1

        thread = threading.Thread(target=watch)
        thread.start()
        try:
            yield seen
        finally:
            stop.set()
            thread.join()


@pytest.fixture
def attacked(tmp_path, tiny_llama):
    return Attacked(tmp_path, tiny_llama)


def test_under_a_limit_of_memory_a_swelling_reply_counts_as_zero(attacked):
    d = attacked
    with (
        d.watched(limit=GIGABYTE * 100) as seen,
        d.superlink(limit_kb=LIMIT_KB),
        d.node(0),
        d.node(1),
        d.attacker(),
    ):
        told = d.ended(d.run_config())

    refused = re.findall(r"round (\d): node \w+: no usable update \(code (\S+)\)", told)
    assert refused == [(str(n), "malformed") for n in range(2, ROUNDS + 1)], told[
        -6000:
    ]
    assert d.usable() == [3, 2, 2]
    assert d.privacy()["releases"] == list(range(1, ROUNDS + 1))
    assert GIGABYTE < seen["largest"] < LIMIT_KB * 1024
    print(f"largest size of the ServerApp: {seen['largest'] / 1e6:.0f} MB")


def test_a_server_that_a_swelling_reply_killed_goes_on_without_its_sender(attacked):
    d = attacked
    with d.watched(limit=3 * GIGABYTE) as seen, d.superlink(), d.node(0), d.node(1):
        with d.attacker():
            d.ended(d.run_config())
        folder, before = d.run, d.privacy()
        assert seen["killed"] == 1 and before["releases"] == [1]
        assert not d.finished()
        with d.node(2):
            told = d.ended(RESUME)

    assert d.run == folder and d.finished(), told[-6000:]
    # Round 2 was asked for, but neither paid for nor released when the server died.
    assert d.privacy()["releases"] == [1, 2, 3]
    assert d.privacy()["epsilon"] > before["epsilon"]
    assert d.usable() == [3, 3, 3]
