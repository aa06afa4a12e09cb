"""Hostile clients on the real wire: a SuperLink, SuperNodes, and an app that attacks."""

import contextlib
import itertools
import json
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.helpers.flower_processes import (
    BIN,
    environment,
    free_port,
    latest_run,
    running,
    typed,
    wait_for_port,
)
from tests.helpers.hostile_app import (
    ATTACKERS,
    CLIP,
    ROUNDS,
    TIMEOUT,
    UNITS,
    hostile_app,
    settings,
)
from tests.helpers.rows import write_rows

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
SECRET = "what-only-this-node-knows"
SAID = (".json", ".jsonl", ".md", ".html", ".log")


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
    attackers = len(attacks) or ATTACKERS
    keys = {"strategy.num-clients": attackers + 1, **keys}
    superlink = [str(BIN / "flower-superlink"), "--insecure", "--port", str(port)]
    superlink += ["--control-api-address", f"127.0.0.1:{free_port()}"]
    with contextlib.ExitStack() as stack:
        stack.enter_context(running(superlink, env, tmp_path / "superlink.log"))
        wait_for_port(port)
        for index in range(attackers + 1):
            rows = write_rows(tmp_path / f"rows-{index}.jsonl", 12, 12 * index)
            own = f'data-path="{rows}"'
            if index < attackers:
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
        r"round (\d+): node \w+: no usable update \(code ([\w-]+)\)", told
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
    assert len(set(nodes)) > len(attacks)
    for text in (told, *written):
        assert SECRET not in text and "no usable update (" not in text
        assert "did not answer" not in text and "clients answered" not in text
        assert not any(node in text for node in nodes)
    for line in (run / "metrics.jsonl").read_text().splitlines():
        counts = {k: v for k, v in json.loads(line).items() if "clients_" in k}
        assert len(counts) == 5 and set(counts.values()) == {None}
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
