"""Real nodes whose server is not trusted: five of them, three of whom are trustees."""

import contextlib
import json
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from fedllm.node.log import read_lines
from fedllm.privacy.sealed_sum import sealed_grid
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
NODES = 5
# What every training returns as its lora_B. A private value, which nobody else may hold.
PATTERN = np.random.default_rng(20).normal(0, 1e-3, 16).astype(np.float32)
PLUGIN = """
import numpy as np
import torch
from transformers.trainer_callback import TrainerCallback


class Marks(TrainerCallback):
    def on_train_end(self, args, state, control, model=None, **kwargs):
        pattern = np.random.default_rng(20).normal(0, 1e-3, 16).astype(np.float32)
        with torch.no_grad():
            for name, value in model.named_parameters():
                if "lora_B" in name and value.requires_grad:
                    whole = np.resize(pattern, value.numel())
                    value.copy_(torch.tensor(whole).view_as(value))


def made():
    return Marks()
"""
SETTINGS = {
    "num-server-rounds": 3,
    "strategy.num-clients": NODES,
    "strategy.round-timeout": 40.0,
    "adapter.kind": "lora",
    "train.plugin": "marked:made",
    "privacy.trust": "trustees",
    "privacy.trustees": ",".join(NAMES),
    "privacy.least-trustees": 2,
    "privacy.delta": 1e-5,
    "privacy.on-destructive-noise": "warn",
}


class SealedNodes(Deployment):
    """Five nodes with homes of their own, the first three trustees, the last without limits."""

    def __init__(self, folder: Path, base: Path) -> None:
        super().__init__(folder, base)
        named = {name: write_identity(folder, name) for name in NAMES}
        self.keys = [path for path, _ in named.values()]
        self.pins = ",".join(f"{name}:{pin}" for name, (_, pin) in named.items())
        about = folder / "site" / "marked-1.0.dist-info"
        about.mkdir(parents=True)
        (about / "METADATA").write_text("Metadata-Version: 2.1\nName: marked\n")
        (about / "top_level.txt").write_text("marked\n")
        (folder / "site" / "marked.py").write_text(PLUGIN)

    def node(self, index: int) -> contextlib.AbstractContextManager[None]:
        rows = write_rows(self.tmp / f"hospital-{index}.jsonl", 12, 12 * index)
        own = f'data-path="{rows}" trusted-trustees="{self.pins}"'
        own += ' train-plugin="marked:made"'
        if index < NODES - 1:
            own += " max-epsilon=8.0 delta=1e-5 least-trustees=2 colluding-trustees=1"
        if index < len(NAMES):
            own += f' trustee-name="{NAMES[index]}" trustee-key="{self.keys[index]}"'
        command = [sys.executable, "-m", "fedllm.commands.main", "supernode"]
        command += ["--insecure", "--home", str(self.home(index))]
        command += ["--superlink", f"127.0.0.1:{self.port}"]
        command += ["--port", str(free_port()), "--node-config", own]
        env = self.env | {"PYTHONPATH": f"{ROOT}:{self.tmp / 'site'}"}
        return running(command, env, self.tmp / f"node-{index}.log")

    def home(self, index: int) -> Path:
        return self.tmp / f"home-{index}"


class Watch:
    """Looks into the ServerApp's memory again and again, in a process of its own."""

    def __init__(self, here: SealedNodes, wanted: Sequence[bytes]) -> None:
        command = [sys.executable, "-m", "tests.helpers.memory_watch"]
        command += [str(here.tmp / "flwr"), "flwr-serverapp"]
        self._command = [*command, *(mark.hex() for mark in wanted)]
        self._log = here.tmp / f"watch-{len(list(here.tmp.glob('watch-*')))}"

    @property
    def looks(self) -> list[str]:
        """Of each look, whether something was found."""
        return self._log.read_text().split()

    def running(self) -> contextlib.AbstractContextManager[None]:
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        return running(self._command, env, self._log)


def marks(here: SealedNodes) -> list[bytes]:
    """The pattern as a client has it: floats, and integers of the grid that travels."""
    privacy = here.privacy()
    grid = sealed_grid(
        privacy["noise_multiplier"], 3, 1, NODES, privacy["num_trainable"]
    )
    unit = grid.sensitivity / privacy["clipping_norm"]
    integers = np.trunc(PATTERN.astype(float) * unit).astype(np.int64)
    values = (PATTERN, PATTERN.astype(float), integers, integers.astype(np.int32))
    return [v[:8].tobytes() for v in values]


@pytest.fixture(scope="module")
def here(tiny_llama, tmp_path_factory):
    nodes = SealedNodes(tmp_path_factory.mktemp("sealed"), tiny_llama)
    with contextlib.ExitStack() as stack:
        stack.enter_context(nodes.superlink())
        for index in range(NODES):
            stack.enter_context(nodes.node(index))
        yield nodes


def test_a_trustee_that_is_killed_costs_its_round_and_the_others_go_on(here):
    here.begin(**SETTINGS)
    wait_until(lambda: len(here.lines()) >= 1)
    wanted = marks(here)
    watch = Watch(here, wanted)
    with watch.running():
        wait_until(lambda: len(here.lines()) >= 2)
        here.kill("flower-supernode", signal.SIGKILL, "hospital-2.jsonl")
        wait_until(here.finished)

    first, second, third = here.usable()
    # The node may have opened round 2 before it died; then the last is the one that is lost.
    assert first == 5 and (second, third) in ((0, 4), (5, 0))
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
    # No update is in the server's memory, in the SuperLink's database, or in the run folder.
    assert len(watch.looks) > 3 and set(watch.looks) == {"0"}
    stored = [*here.tmp.glob("state.db*"), *(p for p in here.run.rglob("*"))]
    read = b"".join(path.read_bytes() for path in stored if path.is_file())
    assert not any(mark in read for mark in wanted)
    assert b"privacy.trustees" in read


def test_the_same_search_finds_the_update_if_the_server_is_trusted(here):
    # The nodes with a floor refuse; the last has none, and its update is what is found.
    wanted, before = marks(here), here.run
    changes = {"privacy.trust": "server", "privacy.trustees": ""}
    changes |= {"privacy.least-trustees": 0, "strategy.num-clients": 4}
    watch = Watch(here, wanted[:1])
    with watch.running():
        here.begin(**{**SETTINGS, **changes, "strategy.wait-for-clients": 60.0})
        wait_until(lambda: here.run != before and here.finished())

    assert here.usable() == [1, 1, 1]
    assert "1" in watch.looks
