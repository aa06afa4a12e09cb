"""Real Flower: the bare `flwr run .`, a SuperLink with SuperNodes, and refusals."""

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.helpers.flower_processes import (
    BIN,
    ROOT,
    end_daemon,
    environment,
    free_port,
    latest_run,
    processes_of,
    running,
    typed,
    wait_for_port,
)
from tests.helpers.listening import listed_jobs, listeners, posted_by_a_stranger
from tests.helpers.rows import MARKER, write_rows

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


def run_config(tiny_llama: Path, folder: Path, **more: object) -> str:
    """Key=value pairs for `flwr run --run-config`."""
    values = {
        "model.name": str(tiny_llama),
        "model.quantization": 4,
        "data.name": write_rows(folder / "rows.jsonl", 24),
        "data.public-validation": write_rows(folder / "validation.jsonl", 6, 100),
        "data.public-test": write_rows(folder / "test.jsonl", 6, 200),
        "num-server-rounds": 2,
        "train.batch-size": 4,
        "train.local-steps": 1,
        # A random model's loss under the noise of a few clients moves either way.
        "privacy.on-destructive-noise": "warn",
        **more,
    }
    return " ".join(f"{k}={json.dumps(v)}" for k, v in values.items())


def simulate(config: str, env: dict[str, str], clients: int = 3):
    command = [sys.executable, "-m", "fedllm.commands.main", "simulate"]
    command += ["--num-supernodes", str(clients), "--run-config", config]
    return typed(command, env)


@pytest.fixture
def env(tmp_path):
    return environment(tmp_path / "flwr", tmp_path / "fedllm")


def test_the_openllama_path_runs_in_a_simulation(tiny_llama, tmp_path, env):
    done = simulate(run_config(tiny_llama, tmp_path), env)

    assert done.returncode == 0, done.stdout + done.stderr
    run = latest_run(tmp_path / "fedllm")
    assert f"run folder: {run}" in done.stdout
    assert json.loads((run / "privacy.json").read_text())["num_rounds"] == 2
    assert "Traceback" not in done.stdout


def test_a_sealed_run_works_in_a_simulation(tiny_llama, tmp_path, env):
    sealed = {"privacy.trust": "trustees", "privacy.trustees": "a,b,c"}

    done = simulate(run_config(tiny_llama, tmp_path, **sealed), env, clients=4)

    assert done.returncode == 0, done.stdout + done.stderr
    run = latest_run(tmp_path / "fedllm")
    privacy = json.loads((run / "privacy.json").read_text())
    assert (privacy["num_rounds"], privacy["trustees"]) == (2, 3)
    lines = [json.loads(x) for x in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["clients_rejected"] for line in lines] == [0, 0, 0]
    assert [line["clients_answered"] for line in lines[1:]] == [4, 4]


def test_a_sealed_run_of_records_works_in_a_simulation(tiny_llama, tmp_path, env):
    sealed = {
        "privacy.trust": "trustees",
        "privacy.trustees": "a,b",
        "privacy.unit": "record",
        "privacy.noise": "joint",
        "privacy.delta": 1e-5,
        "privacy.target-epsilon": 0.0,
        "privacy.noise-multiplier": 1.0,
        "train.batch-size": 2,
        "train.gradient-accumulation": 3,
        "adapter.kind": "ffa-lora",
    }

    done = simulate(run_config(tiny_llama, tmp_path, **sealed), env)

    assert done.returncode == 0, done.stdout + done.stderr
    run = latest_run(tmp_path / "fedllm")
    privacy = json.loads((run / "privacy.json").read_text())
    assert (privacy["num_rounds"], privacy["trustees"]) == (2, 2)
    assert privacy["declared_rows"] == [8, 8, 8]
    assert 0 < privacy["epsilon_adapters"] < privacy["epsilon"]
    lines = [json.loads(x) for x in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["clients_answered"] for line in lines[1:]] == [3, 3]
    assert [line["clients_rejected"] for line in lines] == [0, 0, 0]
    logs = "".join(p.read_text() for p in (tmp_path / "fedllm" / "logs").rglob("*"))
    # A step that failed would be zeros, which nobody else can tell from a batch.
    assert logs.count("sum of a batch after") == 6 and "no update" not in logs
    # Keys and slots of virtual trustees are of no more use.
    assert not list((tmp_path / "fedllm" / "simulated").iterdir())


def test_secret_cohorts_leave_no_trace_of_who_took_part(tiny_llama, tmp_path, env):
    coins = {"strategy.sampling": "poisson", "strategy.fraction-train": 0.5}
    done = simulate(run_config(tiny_llama, tmp_path, **coins), env, clients=4)

    assert done.returncode == 0, done.stdout + done.stderr
    run = latest_run(tmp_path / "fedllm")
    told = json.loads((run / "privacy.json").read_text())
    assert told["num_rounds"] == told["num_sampled_clients"] == 2
    assert told["epsilon"] <= 8 < told["epsilon_replace_one"]
    for line in (run / "metrics.jsonl").read_text().splitlines()[1:]:
        values = json.loads(line)
        assert values["clients_asked"] is values["clients_answered"] is None
        assert values["megabytes_up"] is values["seconds"]["train"] is None
    assert not re.search(r"client \d+ of", done.stdout)
    assert not re.search(r"client \d+: round", done.stdout)


def assert_that_nobody_else_can_steer(pid: int) -> None:
    """Hold a simulation that is at work to what SECURITY.md says of it."""
    found = listeners(pid)
    (gcs,) = [x for x in found if x.program == "gcs_server"]
    clients, *_ = [x for x in found if x.program.startswith("ray::ClientApp")]
    assert [x for x in found if not x.is_local()] == []
    ray = next(
        child.environ()
        for child in psutil.Process(pid).children(recursive=True)
        if child.name() == "gcs_server"
    )
    assert listed_jobs(gcs, None) == "UNAUTHENTICATED"
    assert listed_jobs(gcs, "0" * 64) == "UNAUTHENTICATED"
    # The call is one that Ray answers if it is asked by its own.
    assert listed_jobs(gcs, ray["RAY_AUTH_TOKEN"]) == "OK"
    # Ray's own folders in this one may be written by all.
    got = posted_by_a_stranger([x for x in found if x.is_stream], ray["RAY_TMPDIR"])
    assert got.pop("folder") == "PermissionError"
    assert f"{clients.program}:{clients.port}" in got
    # 401, or no HTTP at all: nothing here takes a run from a stranger.
    assert set(got.values()) <= {401, "BadStatusLine"}, got


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM])
def test_a_simulation_that_is_ended_leaves_no_process(tiny_llama, tmp_path, env, sign):
    config = run_config(tiny_llama, tmp_path, **{"num-server-rounds": 500})
    command = [sys.executable, "-m", "fedllm.commands.main", "simulate"]
    command += ["--num-supernodes", "2", "--run-config", config]
    log = tmp_path / "log.txt"
    with log.open("w") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, env=env, stdout=output, stderr=output
        )
    deadline = time.monotonic() + 300
    while "round 1/500, 2 of 2" not in log.read_text():
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.5)
    assert len(processes_of(tmp_path / "fedllm")) > 3
    assert_that_nobody_else_can_steer(process.pid)

    process.send_signal(sign)

    assert process.wait(timeout=60) == 130
    assert processes_of(tmp_path / "fedllm") == []


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ("train.batch-size=0", "ConfigError: train.batch-size: must be >= 1 (got 0)"),
        (
            "model.name='nobody/no-such-model'",
            "ModelError: ",
        ),
        ("strategy.num-clients=20 strategy.wait-for-clients=1.0", "num-supernodes=20"),
    ],
)
def test_a_wrong_setting_fails_the_run_with_one_line(config, said, tmp_path, env):
    done = simulate(config, env)

    assert done.returncode == 1
    assert said in done.stdout
    assert "Traceback" not in done.stdout


def test_bare_flwr_run_works_on_two_supernodes(tiny_llama, tmp_path, env):
    # Flower's own installation of the dependencies stays on: this is what a user types.
    env["FLWR_LOCAL_SUPERLINK_HTTP_API_PORT"] = str(free_port())
    env["FLWR_LOCAL_CONTROL_API_PORT"] = str(free_port())
    env.pop("FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION", None)
    command = [str(BIN / "flwr"), "run", ".", "--stream"]
    command += ["--run-config", run_config(tiny_llama, tmp_path)]
    try:
        done = typed(command, env, 1000)
    finally:
        end_daemon(tmp_path / "flwr")

    assert "run folder: " in done.stdout, done.stdout[-3000:] + done.stderr[-1000:]
    result = json.loads((latest_run(tmp_path / "fedllm") / "result.json").read_text())
    assert result["num_rounds"] == 2
    assert "with 2 clients the noise" in done.stdout
    # Ray is closed by our app; Flower's SuperLink is not ours to close.
    assert done.stdout.count("executes what any user of this machine posts") == 1


def test_the_same_app_runs_on_a_superlink_with_two_supernodes(
    tiny_llama, tmp_path, env
):
    port = free_port()
    env["FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION"] = "1"
    (tmp_path / "flwr").mkdir()
    (tmp_path / "flwr" / "config.toml").write_text(
        f'[superlink.remote]\naddress = "127.0.0.1:{port}"\ninsecure = true\n'
    )
    superlink = [str(BIN / "flower-superlink"), "--insecure", "--port", str(port)]
    superlink += ["--control-api-address", f"127.0.0.1:{free_port()}"]
    config = run_config(
        tiny_llama,
        tmp_path,
        **{"privacy.unit": "none", "privacy.target-epsilon": 0.0}
        | {"train.local-steps": 6, "train.learning-rate": 5.0},
    )
    with running(superlink, env, tmp_path / "superlink.log"):
        wait_for_port(port)
        nodes = []
        for index in range(2):
            rows = write_rows(tmp_path / f"hospital-{index}.jsonl", 12, 12 * index)
            node = [str(BIN / "flower-supernode"), "--insecure"]
            node += ["--superlink", f"127.0.0.1:{port}", "--port", str(free_port())]
            node += ["--node-config", f'data-path="{rows}"']
            log = tmp_path / f"node-{index}.log"
            nodes.append(running(node, env, log))
        with nodes[0], nodes[1]:
            command = [str(BIN / "flwr"), "run", ".", "remote", "--stream"]
            done = typed([*command, "--run-config", config], env)

    assert "fedllm evaluate --question" in done.stdout, done.stdout + done.stderr
    run = latest_run(tmp_path / "fedllm")
    result = json.loads((run / "result.json").read_text())
    assert result["test_loss_after"] < result["test_loss_before"]
    assert MARKER not in (tmp_path / "superlink.log").read_text()
