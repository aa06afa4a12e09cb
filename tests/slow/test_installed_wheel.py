"""A wheel in an environment of its own, in an empty folder: `fedllm simulate` runs."""

import json
import shutil
import subprocess
import sys
import sysconfig
from importlib import metadata

import pytest

from tests.helpers.flower_processes import ROOT, environment, latest_run
from tests.helpers.rows import write_rows

pytestmark = [pytest.mark.slow, pytest.mark.network, pytest.mark.timeout(600)]
NOT_SOURCE = (".git", ".venv", ".mypy_cache", "dist", "site")


@pytest.fixture
def installed(tmp_path):
    """The folder of the programs of an environment with the wheel.

    Its packages but two are those of the environment at hand. Of Flower, too, the
    programs have to be its own.
    """
    source = tmp_path / "source"
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(*NOT_SOURCE))
    build = (sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir")
    subprocess.run([*build, tmp_path, source], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)
    pip = (sys.executable, "-m", "pip", "--quiet", "--python", venv / "bin" / "python")
    flower = f"flwr=={metadata.version('flwr')}"
    subprocess.run([*pip, "install", "--no-deps", wheel, flower], check=True)
    (own,) = venv.glob("lib/python*/site-packages")
    (own / "borrowed.pth").write_text(sysconfig.get_paths()["purelib"])
    return venv / "bin"


def test_an_installed_wheel_simulates_in_an_empty_folder(
    installed, tiny_llama, tmp_path
):
    env = environment(tmp_path / "flwr", tmp_path / "home")
    env["PATH"] = env["PATH"].partition(":")[2]
    values = {
        "model.name": str(tiny_llama),
        "model.quantization": 0,
        "data.name": write_rows(tmp_path / "rows.jsonl", 12),
        "data.public-validation": write_rows(tmp_path / "validation.jsonl", 6, 100),
        "data.public-test": write_rows(tmp_path / "test.jsonl", 6, 200),
        "num-server-rounds": 1,
        "train.batch-size": 4,
        "privacy.unit": "none",
    }
    pairs = " ".join(f"{key}={json.dumps(value)}" for key, value in values.items())
    empty = tmp_path / "empty"
    empty.mkdir()

    done = subprocess.run(
        [installed / "fedllm", "simulate", "--clients", "2", "--run-config", pairs],
        cwd=empty,
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 0, done.stdout + done.stderr
    assert (latest_run(tmp_path / "home") / "result.json").exists()
    assert not any(empty.iterdir())
    assert "Traceback" not in done.stdout + done.stderr
