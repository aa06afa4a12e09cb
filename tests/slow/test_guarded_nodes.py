"""Real nodes that run what their owners chose, and answer what they approved."""

import contextlib
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import dp_accounting
import pytest
from dp_accounting.pld.pld_privacy_accountant import PLDAccountant
from safetensors.numpy import load

from fedllm.node.log import check_log, read_lines
from fedllm.wire.messages import DELIVER
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

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
FEDLLM = [sys.executable, "-m", "fedllm.commands.main"]
SETTINGS = {"num-server-rounds": 1, "privacy.unit": "none", "strategy.num-clients": 3}
APPROVES = 2
BY_ITSELF = 0
JOINT = {
    "num-server-rounds": 3,
    "privacy.unit": "record",
    "privacy.noise": "joint",
    "privacy.target-epsilon": 4.0,
    "privacy.delta": 1e-5,
    "train.batch-size": 1,
    "train.gradient-accumulation": 6,
    "strategy.server-learning-rate": 0.01,
    "strategy.server-learning-rate-min": 0.01,
}
PERSONAL = {"personal.epochs": 1.0, "personal.learning-rate": 0.02}


class GuardedNodes(Deployment):
    """Three nodes with homes of their own.

    The first trains on by itself after a run, and the last approves each run.
    """

    def node(self, index: int) -> contextlib.AbstractContextManager[None]:
        # Enough of them for a personal adapter.
        rows = write_rows(self.tmp / f"hospital-{index}.jsonl", 60, 60 * index)
        command = [*FEDLLM, "supernode", "--insecure", "--home", str(self.home(index))]
        command += ["--superlink", f"127.0.0.1:{self.port}"]
        command += ["--port", str(free_port()), "--log-head", str(self.head(index))]
        command += ["--node-config", f'data-path="{rows}" declared-rows=60']
        command += ["--approve", "each"] if index == APPROVES else []
        command += ["--personal", "after-run"] if index == BY_ITSELF else []
        env = self.env | {"PYTHONPATH": str(ROOT)}
        return running(command, env, self.tmp / f"node-{index}.log")

    def home(self, index: int) -> Path:
        return self.tmp / f"home-{index}"

    def head(self, index: int) -> Path:
        return self.tmp / f"head-{index}"

    def head_is_current(self, index: int) -> bool:
        noted = self.head(index).read_text()
        return str(check_log(self.home(index) / "node" / "node.log", noted)) in noted

    def said(self, index: int) -> str:
        return (self.tmp / f"node-{index}.log").read_text()

    def log(self, index: int) -> list[dict]:
        """Return a node's own log."""
        path = self.home(index) / "node" / "node.log"
        return list(read_lines(path)) if path.exists() else []

    def own(self, *words: str) -> list[str]:
        """Type `fedllm node` at the node that approves."""
        command = [*FEDLLM, "node", *words, "--home", str(self.home(APPROVES))]
        # To train a personal adapter takes a while on a busy machine.
        done = typed(command, self.env | {"PYTHONPATH": str(ROOT)}, 600)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout.splitlines()

    def answered(self, **more: object) -> list[int]:
        """Run the app, and return how many clients counted in each round."""
        command = [str(BIN / "flwr"), "run", str(ROOT), "remote", "--stream"]
        command += ["--run-config", self.config(**{**SETTINGS, **more})]
        done = typed(command, self.env, 300)
        assert self.finished(), done.stdout + done.stderr
        return self.usable()


@pytest.fixture(scope="module")
def nodes(
    tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[GuardedNodes]:
    here = GuardedNodes(tmp_path_factory.mktemp("guarded"), tiny_llama)
    with contextlib.ExitStack() as stack:
        stack.enter_context(here.superlink())
        for index in range(3):
            stack.enter_context(here.node(index))
        yield here


def test_a_node_that_approves_each_run_answers_that_run_and_no_other(nodes):
    assert nodes.answered() == [2]
    waits, *_ = nodes.own("list")
    nodes.own("approve", waits.split()[1])
    assert nodes.answered() == [3]
    # The server sends what was approved but for one value.
    assert nodes.answered(seed=7) == [2]
    assert "  seed: 42 -> 7" in nodes.own("list")

    assert "--approve all, the default with --insecure" in nodes.said(0)
    assert "--approve each)" in nodes.said(APPROVES)
    assert "waits for: fedllm node approve" in nodes.said(APPROVES)
    answers = [x for x in nodes.log(APPROVES) if x["event"] == "answered"]
    assert [x["code"] for x in answers] == ["not-approved", None, "not-approved"]
    assert [x["num_bytes"] > 0 for x in answers] == [False, True, False]
    for index in range(2):
        first, second, *_ = nodes.log(index)
        assert first["refused"] is None and second["num_bytes"] > 0
        assert "clients are forked by process" in nodes.said(index)


def test_each_node_trains_on_from_what_the_run_brought_it_and_tells_nobody(nodes):
    before = nodes.own("list")
    assert nodes.answered(**PERSONAL) == [2]
    waits, *_ = (line for line in nodes.own("list") if line not in before)
    nodes.own("approve", waits.split()[1])
    # Its one round, and the delivery besides.
    assert nodes.answered(**PERSONAL) == [3]
    delivered = [x for x in nodes.log(APPROVES) if x.get("message_type") == DELIVER]
    assert [x["refused"] is None for x in delivered] == [False, True]
    asked = [x for x in nodes.log(1) if x["event"] == "asked"]
    assert asked[-1]["message_type"] == DELIVER
    assert nodes.log(1)[-1]["num_bytes"] == 0

    line, warning = nodes.own("personal")

    assert "chosen by" in line and "is not private" in warning
    (made,) = nodes.home(APPROVES).glob("personal/*/client-*/personal")
    wait_until(
        lambda: len(list(nodes.home(BY_ITSELF).glob("personal/*/*/personal"))) == 2, 180
    )
    assert not list(nodes.home(1).glob("personal/*/*/personal"))
    values = load((made / "trained.safetensors").read_bytes())
    weights = values[min(values)].tobytes()
    for path in nodes.tmp.rglob("*"):
        if path.is_file() and made not in path.parents:
            assert weights not in path.read_bytes(), path


def test_nodes_share_one_noise_and_each_counts_every_step(nodes):
    assert nodes.answered(**JOINT) == [2, 2, 2]

    privacy = nodes.privacy()
    assert privacy["declared_rows"] == [60, 60] and privacy["num_rounds"] == 3
    event = dp_accounting.PoissonSampledDpEvent(
        6 / 120, dp_accounting.GaussianDpEvent(privacy["noise_multiplier"])
    )
    relation = dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE
    accountant = PLDAccountant(relation).compose(event, 3)
    theirs = accountant.get_epsilon(privacy["delta"])
    assert privacy["epsilon"] == pytest.approx(theirs, rel=1e-3)
    assert theirs <= privacy["target_epsilon"] == 4.0
    for index in (0, 1):
        (path,) = nodes.home(index).glob("ledgers/own/**/ledger.json")
        releases = json.loads(path.read_text())["content"]["releases"]
        z = privacy["noise_multiplier"]
        assert releases == [[pytest.approx(z), 6 / 120, 3]]


def test_a_node_refuses_an_app_that_is_not_its_own_and_imports_none_of_it(
    nodes, tmp_path
):
    changed, marker = tmp_path / "app", tmp_path / "imported"
    changed.mkdir()
    shutil.copytree(ROOT / "fedllm", changed / "fedllm")
    for name in ("pyproject.toml", "LICENSE"):
        shutil.copy(ROOT / name, changed)
    with (changed / "fedllm" / "client_app.py").open("a") as file:
        file.write(f"\nopen({str(marker)!r}, 'a').write('x')\n")
    command = [str(BIN / "flwr"), "run", str(changed), "remote", "--run-config"]
    before = [len(nodes.log(index)) for index in range(3)]
    done = typed([*command, nodes.config(**SETTINGS)], nodes.env, 120)
    assert done.returncode == 0, done.stdout + done.stderr
    wait_until(
        lambda: [len(nodes.log(index)) for index in range(3)]
        == [number + 2 for number in before]
    )

    for index in range(3):
        asked, answered = nodes.log(index)[-2:]
        assert "client_app.py" in asked["refused"]
        assert answered["code"] == "not-approved" and answered["num_bytes"] == 0
        # A line is noted elsewhere after it is written.
        wait_until(lambda index=index: nodes.head_is_current(index))
    # The ServerApp imports the changed package; no node does.
    assert not marker.exists()
