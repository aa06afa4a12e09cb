"""Hostile clients on the real wire: a SuperLink, SuperNodes, and an app that attacks."""

import contextlib
import itertools
import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.slow.flower_processes import (
    BIN,
    ROOT,
    environment,
    free_port,
    latest_run,
    running,
    typed,
    wait_for_port,
)
from tests.test_federation import write_rows

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

HERE = Path(__file__).parent / "hostile"
SECRET = "what-only-this-node-knows"
SAID = (".json", ".jsonl", ".md", ".html", ".log")
ROUNDS, ATTACKERS, CLIP, TIMEOUT = 9, 3, 0.5, 40.0


def hostile_app(folder: Path) -> Path:
    """fedllm with its ClientApp exchanged for the attacking one."""
    shutil.copytree(
        ROOT / "fedllm", folder / "fedllm", ignore=shutil.ignore_patterns("__pycache__")
    )
    shutil.copy(HERE / "hostile_client.py", folder / "fedllm")
    for name in ("README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    text = (ROOT / "pyproject.toml").read_text()
    ours = 'clientapp = "fedllm.client_app:app"'
    assert ours in text
    theirs = 'clientapp = "fedllm.hostile_client:app"'
    (folder / "pyproject.toml").write_text(text.replace(ours, theirs))
    return folder


def settings(base: Path, folder: Path, **more: object) -> str:
    values = {
        "model.name": str(base),
        "model.quantization": 0,
        "data.name": write_rows(folder / "unused.jsonl", 4),
        "data.public-validation": write_rows(folder / "validation.jsonl", 6, 100),
        "data.public-test": write_rows(folder / "test.jsonl", 6, 200),
        "num-server-rounds": ROUNDS,
        "train.batch-size": 4,
        "train.local-steps": 2,
        "strategy.num-clients": ATTACKERS + 1,
        "strategy.round-timeout": TIMEOUT,
        "strategy.server-learning-rate": 1.0,
        "strategy.server-learning-rate-min": 1.0,
        **more,
    }
    return " ".join(f"{key}={json.dumps(value)}" for key, value in values.items())


UNITS = {
    # So little noise that what a reply adds can be seen in the adapters.
    "client": {
        "privacy.target-epsilon": 0.0,
        "privacy.noise-multiplier": 0.001,
        "privacy.clipping-norm": CLIP,
        "privacy.noise-probe": False,
    },
    "none": {"privacy.unit": "none", "privacy.target-epsilon": 0.0},
}


def attacked(
    tmp_path: Path, base: Path, attacks: Sequence[str] = (), **keys: object
) -> tuple[Path, str]:
    """Run a federation of attackers and an honest node; return its folder and its log.

    Args:
        tmp_path: Where everything lies.
        base: The base model.
        attacks: What each attacker does every round; none: all in turn.
        keys: Of the run config.
    """
    env = environment(tmp_path / "flwr", tmp_path / "home") | {
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "OMP_NUM_THREADS": "1",
    }
    port = free_port()
    (tmp_path / "flwr").mkdir()
    (tmp_path / "flwr" / "config.toml").write_text(
        f'[superlink.remote]\naddress = "127.0.0.1:{port}"\ninsecure = true\n'
    )
    app = hostile_app(tmp_path / "app")
    superlink = [str(BIN / "flower-superlink"), "--insecure", "--port", str(port)]
    superlink += ["--control-api-address", f"127.0.0.1:{free_port()}"]
    with contextlib.ExitStack() as stack:
        stack.enter_context(running(superlink, env, tmp_path / "superlink.log"))
        wait_for_port(port)
        for index in range(ATTACKERS + 1):
            rows = write_rows(tmp_path / f"rows-{index}.jsonl", 12, 12 * index)
            own = f'data-path="{rows}"'
            if index < ATTACKERS:
                own += f" attacker={index}"
                own += f' attack="{attacks[index]}"' if attacks else ""
            node = [str(BIN / "flower-supernode"), "--insecure", "--node-config", own]
            node += ["--superlink", f"127.0.0.1:{port}", "--port", str(free_port())]
            stack.enter_context(running(node, env, tmp_path / f"node-{index}.log"))
        command = [str(BIN / "flwr"), "run", str(app), "remote", "--stream"]
        config = settings(base, tmp_path, **keys)
        done = typed([*command, "--run-config", config], env, 800)
    return latest_run(tmp_path / "home"), done.stdout


@pytest.mark.parametrize("unit", UNITS)
def test_no_attack_stops_or_steers_the_federation(unit, tiny_llama, tmp_path):
    run, told = attacked(tmp_path, tiny_llama, **UNITS[unit])

    assert (run / "result.json").exists(), told[-6000:]
    lines = [json.loads(x) for x in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["server_round"] for line in lines] == list(range(ROUNDS + 1))
    for line in lines[1:]:
        assert sum(line["seconds"].values()) < TIMEOUT + 60
    # Under the clip a huge update counts, cut to C; without it, it is turned away.
    refused = re.findall(
        r"round (\d+): node \d+: no usable update \(code ([\w-]+)\)", told
    )
    codes = {code for _, code in refused}
    assert {"malformed", "not-finite", "failed"} <= codes
    assert ("out-of-range" in codes) == (unit == "none")
    assert (SECRET in told) == (unit == "none")
    assert len(told) < 200_000
    if unit == "client":
        assert steps(run) and max(steps(run)) <= CLIP * 1.02
        assert json.loads((run / "privacy.json").read_text())["num_rounds"] == ROUNDS


def test_where_cohorts_are_secret_attackers_are_not_told_of(tiny_llama, tmp_path):
    secret = {
        **UNITS["client"],
        "num-server-rounds": 2,
        "strategy.sampling": "poisson",
        "strategy.fraction-train": 0.9,
    }
    attacks = ["long error", "raises", "many"]
    run, told = attacked(tmp_path, tiny_llama, attacks, **secret)

    assert (run / "result.json").exists(), told[-6000:]
    written = [p.read_text() for p in run.rglob("*") if p.suffix in SAID]
    nodes = re.findall(r"node_id=(\d{9,})", (tmp_path / "superlink.log").read_text())
    assert len(set(nodes)) > ATTACKERS
    for text in (told, *written):
        assert SECRET not in text and "no usable update (" not in text
        assert "did not answer" not in text and "clients answered" not in text
        assert not any(node in text for node in nodes)
    for line in (run / "metrics.jsonl").read_text().splitlines():
        counts = {k: v for k, v in json.loads(line).items() if "clients_" in k}
        assert len(counts) == 4 and set(counts.values()) == {None}
    assert json.loads((run / "privacy.json").read_text())["num_rounds"] == 2


def steps(run: Path) -> list[float]:
    """How far each round moved the adapter."""
    saved = [
        load_file(run / f"peft_{number}" / "adapter_model.safetensors")
        for number in range(1, ROUNDS + 1)
    ]
    return [
        float(np.sqrt(sum(np.sum((new[k] - old[k]) ** 2.0) for k in old)))
        for old, new in itertools.pairwise(saved)
    ]
