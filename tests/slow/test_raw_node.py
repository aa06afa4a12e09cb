"""What a registered node can learn or do that speaks the Fleet API by itself.

A real SuperLink behind the real gate. The test plays the nodes: an honest one replies by
fedllm's own `reply_to`, the attacker knows the rows, the settings and every node's id.
"""

import contextlib
import copy
import json
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
from flwr.app import Context, Message, RecordDict
from flwr.app.message import make_message
from flwr.proto.fleet_pb2 import PullMessagesRequest
from flwr.proto.run_pb2 import GetRunRequest
from flwr.supercore.inflatable.inflatable_object import no_object_id_recompute
from flwr.supercore.inflatable.inflatable_utils import ObjectPullError

from fedllm.client.message_handler import reply_to
from fedllm.wire.messages import ARRAYS, ERROR_CODES, array_record, error_content
from fedllm.wire.task_identity import set_task_identity
from tests.helpers.flower_messages import as_sent
from tests.helpers.flower_objects import object_ids
from tests.helpers.flower_processes import (
    BIN,
    environment,
    free_port,
    running,
    typed,
    wait_for_port,
    wait_until,
)
from tests.helpers.raw_federation import write_app
from tests.helpers.raw_node import RawNode, unfinished_request
from tests.helpers.rows import write_rows

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
# Which node the attacker wants what of.
ATTACKER, LEARNT, FAILING, FORGED, SILENCED, UNREGISTERED = range(1, 7)
MIB = 2**20
READ_BODY_SECONDS = 60


class Federation:
    """SuperLink and gate, and the nodes that the test plays."""

    def __init__(self, tmp: Path, base: Path) -> None:
        self.tmp, self.keys = tmp, tmp / "keys"
        self.port, self.gate_port = free_port(), free_port()
        self.env = environment(tmp / "flwr", tmp / "home") | {"OMP_NUM_THREADS": "1"}
        self.run_command(
            "keys",
            "--out",
            str(self.keys),
            "--server-name",
            "localhost",
            "--nodes",
            "6",
            "--control-address",
            f"127.0.0.1:{self.port}",
        )
        (tmp / "flwr").mkdir()
        (tmp / "flwr" / "config.toml").write_text(
            (self.keys / "config.toml").read_text()
        )
        self.rows = write_rows(tmp / "rows.jsonl", 12)
        self.settings = {
            "model.name": str(base),
            "model.quantization": 0,
            "adapter.rank": 1,
            "data.name": self.rows,
            "train.batch-size": 4,
            "train.local-steps": 1,
            # Longer than all that follows, since the attacker never replies.
            "strategy.round-timeout": 400.0,
        }
        self.out = tmp / "read.json"
        self.ids: dict[int, int] = {}
        self.closing = contextlib.ExitStack()

    def run_command(self, name: str, *words: str) -> None:
        command = [sys.executable, "-m", f"fedllm.commands.{name}", *words]
        done = typed(command, self.env, 60)
        assert done.returncode == 0, done.stderr

    @contextlib.contextmanager
    def servers(self) -> Iterator[None]:
        superlink = [sys.executable, "-m", "fedllm.commands.superlink"]
        superlink += ["--keys", str(self.keys), "--home", str(self.tmp / "server")]
        superlink += ["--port", str(self.port)]
        gate = ["caddy", "run", "--config", "deploy/Caddyfile", "--adapter"]
        env = self.env | {
            "FEDLLM_KEYS": str(self.keys),
            "FEDLLM_GATE_PORT": str(self.gate_port),
            "FEDLLM_SUPERLINK_PORT": str(self.port),
        }
        with (
            running(superlink, env, self.tmp / "superlink.log"),
            running([*gate, "caddyfile"], env, self.tmp / "gate.log"),
        ):
            wait_for_port(self.port)
            wait_for_port(self.gate_port)
            yield

    def flwr(self, *words: str) -> "subprocess.CompletedProcess[str]":
        done = typed([str(BIN / "flwr"), *words], self.env, 60)
        assert done.returncode == 0, done.stdout + done.stderr
        return done

    def node(self, number: int) -> RawNode:
        address = f"localhost:{self.gate_port}"
        key = self.keys / "nodes" / f"node-{number}"
        return self.closing.enter_context(RawNode(key, address, self.keys / "ca.crt"))

    def register(self, number: int) -> RawNode:
        public = str(self.keys / "nodes" / f"node-{number}.pub")
        self.flwr("supernode", "register", public, "private")
        node = self.node(number)
        self.ids[number] = node.activate()
        return node

    def start_run(self, nodes: int) -> None:
        told = {"settings": json.dumps(self.settings), "out": str(self.out)}
        path = self.tmp / "run.toml"
        lines = [f"{key} = {json.dumps(value)}\n" for key, value in told.items()]
        path.write_text("".join(lines) + f"nodes = {nodes}\n")
        app = write_app(self.tmp / "app")
        self.flwr("run", str(app), "private", "--run-config", str(path))

    def answer(self, instruction: Message, rows: str | None = None) -> Message:
        """Return what the honest client of these rows replies."""
        node = {"data-path": rows or self.rows}
        settings: dict[str, Any] = self.settings
        context = Context(instruction.metadata.run_id, 1, node, RecordDict(), settings)
        return reply_to(instruction, context)

    def read(self) -> dict[int, dict[str, Any]]:
        """Return what the server read, by the node's number."""
        told = json.loads(self.out.read_text()) if self.out.exists() else {}
        return {n: told[str(i)] for n, i in self.ids.items() if str(i) in told}

    def superlink_mib(self) -> float:
        """Return the resident size of the SuperLink."""
        sizes = []
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if "flower-superlink" in " ".join(process.cmdline()):
                    sizes.append(process.memory_info().rss)
        return max(sizes) / MIB


def candidates(mine: Message, node_id: int, within: int = 5000) -> set[str]:
    """Return the ids that another node's message of this round may have.

    Messages of a round are made within some tens of microseconds of each other.

    Args:
        mine: The attacker's own instruction.
        node_id: The other node.
        within: How far off its making may be, in microseconds.
    """
    made = round(mine.metadata.created_at * 1e6)
    found = set()
    with no_object_id_recompute():
        for moment in range(made - within, made + within + 1):
            metadata = copy.copy(mine.metadata)
            metadata.__dict__["_dst_node_id"] = node_id
            metadata.__dict__["_created_at"] = moment / 1e6
            found.add(make_message(metadata, mine.content).object_id)
    return found


def forged(mine: Message, message_id: str, node_id: int) -> Message:
    """Return a reply of 666s under another node's name."""
    arrays = mine.content.array_records[ARRAYS]
    values = {k: np.full_like(a.numpy(), 666) for k, a in arrays.items()}
    reply = Message(as_sent(RecordDict({ARRAYS: array_record(values)})), reply_to=mine)
    reply.metadata.__dict__["_src_node_id"] = node_id
    reply.metadata.__dict__["_reply_to_message_id"] = message_id
    return reply


class Story:
    """One round in which the attacker tries everything, and what came of it.

    Attributes:
        guessed: Objects that the attacker expected of the others and found there.
        there: Objects of an honest reply that were found there by the same requests.
        known: Messages of others whose id the attacker could work out.
        read: What the server read of each node.
    """

    def __init__(self, here: Federation) -> None:
        self.here = here
        self.nodes = {n: here.register(n) for n in range(1, UNREGISTERED)}
        here.start_run(len(self.nodes))
        pulled = {n: node.pull_message() for n, node in self.nodes.items()}
        self.run_id = pulled[ATTACKER][0].metadata.run_id
        self.known: set[int] = set()
        self.mine = self.nodes[ATTACKER].inflate(*pulled[ATTACKER])
        for number in (FORGED, SILENCED):
            self.attack(number, pulled[number][0].metadata.message_id)
        for number in (FORGED, SILENCED):
            self.reply_honestly(number, pulled[number])
        self.guessed, self.there = self.look_for_guesses(pulled)
        wait_until(lambda: {FORGED, LEARNT, FAILING} <= set(here.read()), 120)
        self.read = here.read()

    def attack(self, number: int, message_id: str) -> None:
        """Answer in another node's name, or take its message away."""
        attacker, node_id = self.nodes[ATTACKER], self.here.ids[number]
        tried = candidates(self.mine, node_id)
        if message_id in tried:
            self.known.add(number)
        name = message_id if message_id in tried else min(tried)
        if number == SILENCED:
            attacker.confirm(self.run_id, name)
            return
        with contextlib.suppress(httpx.HTTPError):
            attacker.push(forged(self.mine, name, node_id))

    def reply_honestly(self, number: int, pulled: Any) -> None:
        """Fetch an instruction and reply; what went wrong shows in what was read."""
        with contextlib.suppress(ObjectPullError, ValueError, httpx.HTTPError):
            node = self.nodes[number]
            node.push(self.here.answer(node.inflate(*pulled)))

    def look_for_guesses(self, pulled: dict[int, Any]) -> tuple[set[str], set[str]]:
        """Name objects that honest nodes will send, and see which the server then has."""
        attacker, here = self.nodes[ATTACKER], self.here
        own = here.answer(self.mine)
        named = [own.content, *(error_content(code, None) for code in ERROR_CODES)]
        guesses = set().union(*map(object_ids, named))
        honest = here.answer(self.nodes[LEARNT].inflate(*pulled[LEARNT]))
        failed = here.answer(
            self.nodes[FAILING].inflate(*pulled[FAILING]), str(here.tmp / "gone.jsonl")
        )
        # No attacker knows these: they show that the look at the store works.
        sent = object_ids(honest.content) | object_ids(failed.content)
        attacker.push(own, named=[*named, honest.content, failed.content], sends=False)
        self.nodes[LEARNT].push(honest)
        self.nodes[FAILING].push(failed)
        there: set[str] = set()
        deadline = time.monotonic() + 4
        while time.monotonic() < deadline:
            for name in (guesses | sent) - there:
                if attacker.content_of(self.run_id, name):
                    there.add(name)
            time.sleep(0.2)
        return guesses & there, sent & there


@pytest.fixture(scope="module")
def here(
    tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Federation]:
    set_task_identity()
    federation = Federation(tmp_path_factory.mktemp("raw"), tiny_llama)
    with (
        pytest.MonkeyPatch.context() as patch,
        federation.servers(),
        federation.closing,
    ):
        patch.setenv("FEDLLM_HOME", str(federation.tmp / "node"))
        yield federation


class Slow(threading.Thread):
    """A request of a listed key whose body never ends, and how long it is borne."""

    def __init__(self, here: Federation) -> None:
        super().__init__(daemon=True)
        self.here, self.seconds, self.answer = here, float("inf"), b""

    def run(self) -> None:
        key = self.here.node(UNREGISTERED).public
        connection = unfinished_request(
            self.here.gate_port, self.here.keys / "ca.crt", key, 5 * MIB, MIB
        )
        began = time.monotonic()
        connection.settimeout(READ_BODY_SECONDS + 30)
        with connection, contextlib.suppress(TimeoutError):
            self.answer = connection.recv(1000)
            self.seconds = time.monotonic() - began


@pytest.fixture(scope="module")
def slow(here: Federation) -> Slow:
    thread = Slow(here)
    thread.start()
    return thread


@pytest.fixture(scope="module")
def story(here: Federation, slow: Slow) -> Story:
    return Story(here)


def test_a_fellow_node_learns_nothing_of_a_reply(story):
    assert story.there and story.guessed == set()


def test_an_honest_reply_and_an_honest_failure_count(story):
    assert story.read[LEARNT]["code"] is None
    assert story.read[FAILING] == {"code": "no-data", "first": None}


@pytest.mark.parametrize("number", [FORGED, SILENCED])
def test_nobody_finds_anothers_message_or_answers_it_or_takes_it_away(story, number):
    assert number not in story.known
    assert story.read[number]["code"] is None
    assert abs(story.read[number]["first"]) < 100


def test_flower_still_shows_every_node_what_the_ledger_says_it_does(story):
    node = story.nodes[ATTACKER]
    answer = node.client.GetRun(GetRunRequest(node=node.node, run_id=story.run_id))

    # The epsilon of `poisson` is not claimed against registered nodes while this is so.
    assert answer.run.bytes_recv > 0 and answer.run.clientapp_runtime >= 2.0


def test_a_listed_key_that_is_not_registered_is_not_authenticated(here, story):
    with pytest.raises(httpx.HTTPStatusError) as error:
        here.node(UNREGISTERED).activate()
    assert error.value.response.status_code != 403
    node = here.node(UNREGISTERED)
    node.node = story.nodes[LEARNT].node
    with pytest.raises(httpx.HTTPStatusError) as error:
        node.pull_message(1)
    assert error.value.response.status_code == 401


def test_whoever_is_shut_out_is_out_at_the_next_request(here, story):
    node = story.nodes[LEARNT]
    node.client.PullMessages(PullMessagesRequest(node=node.node))
    here.flwr("supernode", "unregister", str(here.ids[LEARNT]), "private")

    with pytest.raises(httpx.HTTPStatusError) as error:
        node.client.PullMessages(PullMessagesRequest(node=node.node))
    assert error.value.response.status_code == 401


@pytest.mark.parametrize("key", ["stranger", "none", ""])
def test_a_stranger_costs_the_superlink_no_memory(here, story, key, tmp_path):
    public = key.encode()
    if key == "stranger":
        here.run_command("keys", "--out", str(tmp_path / "k"), "--add-node", "x")
        private = tmp_path / "k" / "nodes" / "x"
        address = f"localhost:{here.gate_port}"
        with RawNode(private, address, here.keys / "ca.crt") as stranger:
            public = stranger.public
            with pytest.raises(httpx.HTTPStatusError, match="403"):
                stranger.activate()
    before = here.superlink_mib()

    def unfinished(_: int) -> ssl.SSLSocket:
        ca = here.keys / "ca.crt"
        return unfinished_request(here.gate_port, ca, public, 15 * MIB, 15 * MIB - 1)

    with ThreadPoolExecutor(20) as pool:
        opened = list(pool.map(unfinished, range(20)))
    time.sleep(1)
    grown = here.superlink_mib() - before
    for connection in opened:
        connection.close()

    assert grown < 50


def test_a_body_that_does_not_end_is_cut_off(slow):
    slow.join(READ_BODY_SECONDS + 40)

    assert READ_BODY_SECONDS - 5 < slow.seconds < READ_BODY_SECONDS + 5
    # 504, or 499 if the gate thinks that its client has left.
    assert slow.answer[9:12] in (b"504", b"499")
