"""Real nodes whose server is not trusted: sealed rounds over a SuperLink."""

import contextlib
import json
import signal
import sys
from pathlib import Path

import pytest

from fedllm.node.log import read_lines
from tests.helpers.flower_processes import (
    ROOT,
    Deployment,
    free_port,
    running,
    wait_until,
)
from tests.helpers.identities import write_identity
from tests.helpers.rows import write_rows

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
NAMES = ("a", "b", "c")
SETTINGS = {
    "num-server-rounds": 3,
    "strategy.num-clients": 3,
    "strategy.round-timeout": 40.0,
    "privacy.trust": "trustees",
    "privacy.trustees": ",".join(NAMES),
    "privacy.least-trustees": 2,
    "privacy.delta": 1e-5,
    "privacy.on-destructive-noise": "warn",
}


class SealedNodes(Deployment):
    """Three nodes with homes of their own, each a client and a trustee."""

    def __init__(self, folder: Path, base: Path) -> None:
        super().__init__(folder, base)
        named = {name: write_identity(folder, name) for name in NAMES}
        self.keys = [path for path, _ in named.values()]
        self.pins = ",".join(f"{name}:{pin}" for name, (_, pin) in named.items())

    def node(self, index: int) -> contextlib.AbstractContextManager[None]:
        rows = write_rows(self.tmp / f"hospital-{index}.jsonl", 12, 12 * index)
        own = f'data-path="{rows}" max-epsilon=8.0 delta=1e-5 least-trustees=2'
        own += f' colluding-trustees=1 trusted-trustees="{self.pins}"'
        own += f' trustee-name="{NAMES[index]}" trustee-key="{self.keys[index]}"'
        command = [sys.executable, "-m", "fedllm.commands.main", "supernode"]
        command += ["--insecure", "--home", str(self.home(index))]
        command += ["--superlink", f"127.0.0.1:{self.port}"]
        command += ["--port", str(free_port()), "--node-config", own]
        env = self.env | {"PYTHONPATH": str(ROOT)}
        return running(command, env, self.tmp / f"node-{index}.log")

    def home(self, index: int) -> Path:
        return self.tmp / f"home-{index}"


def test_a_trustee_that_is_killed_costs_its_round_and_the_others_go_on(
    tiny_llama, tmp_path
):
    here = SealedNodes(tmp_path, tiny_llama)
    with contextlib.ExitStack() as stack:
        stack.enter_context(here.superlink())
        for index in range(3):
            stack.enter_context(here.node(index))
        here.begin(**SETTINGS)
        wait_until(lambda: len(here.lines()) >= 2)
        here.kill("flower-supernode", signal.SIGKILL, "hospital-2.jsonl")
        wait_until(here.finished)

    first, second, third = here.usable()
    # The node may have opened round 2 before it died; then the last is the one that is lost.
    assert first == 3 and (second, third) in ((0, 2), (3, 0))
    privacy = here.privacy()
    assert privacy["releases"] == [1, 2, 3]
    assert (privacy["trustees"], privacy["colluding"]) == (3, 1)
    assert privacy["epsilon_adapters"] < privacy["epsilon"] <= 8.0
    for index in range(2):
        home = here.home(index)
        ledger = json.loads(
            (home / "trustees" / NAMES[index] / "ledger.json").read_text()
        )
        (run,) = ledger["content"]["runs"].values()
        assert run["slot"] == 3 and run["key"] == ""
        assert (home / "ledgers" / "slots" / "ledger.json").exists()
        asked = [
            line["message_type"]
            for line in read_lines(home / "node" / "node.log")
            if line["event"] == "asked"
        ]
        assert asked.count("query.hello") == 1
        assert asked.count("query.tally") == asked.count("train") == 3
