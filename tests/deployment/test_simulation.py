"""A simulation: how many clients train at a time, and what Flower is shown."""

import os
import sys
import types
from pathlib import Path

import psutil
import pytest

from fedllm.deployment import simulation
from fedllm.errors import ConfigError
from fedllm.models.known import BUILT_IN_MODEL

ROOT = Path(__file__).parents[2]
GIB = 2**30


def cpus(monkeypatch, cores, free, clients=20, model=BUILT_IN_MODEL.name):
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    memory = types.SimpleNamespace(available=int(free * GIB))
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    return simulation.fitting_cpus(model, clients)


@pytest.mark.parametrize(
    ("cores", "free", "clients", "wanted"),
    [
        (2, 20, 20, 1),
        (16, 64, 20, 1),
        (16, 64, 5, 4),  # no more actors than clients
        (16, 64, 1, 16),
        (8, 6.5, 20, 3),  # three fit
        (8, 0.5, 20, 8),  # one has to
        (1, 20, 20, 1),
    ],
)
def test_a_client_gets_few_cpus_where_memory_allows(
    monkeypatch, cores, free, clients, wanted
):
    assert cpus(monkeypatch, cores, free, clients) == wanted


@pytest.mark.parametrize("model", ["openlm-research/open_llama_3b_v2", None])
def test_with_a_model_of_unknown_size_the_number_is_flower_s(monkeypatch, model):
    assert cpus(monkeypatch, 8, 64, model=model) == 2


@pytest.fixture
def app(tmp_path):
    """An app's folder with an environment and git's folder in it."""
    folder = tmp_path / "app"
    for name in ("pyproject.toml", "code/a.py", ".gitignore", ".git/HEAD"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    for name in ("pyvenv.cfg", "lib/b.py"):
        (folder / "env" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "env" / name).write_text(name)
    return folder


def files(folder):
    return {
        str(path.relative_to(folder)): path.read_text()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_flower_is_shown_the_app_without_environments(app, tmp_path, monkeypatch):
    wanted = {name: name for name in ("pyproject.toml", "code/a.py", ".gitignore")}
    linked = simulation.app_without_environments(app, tmp_path / "linked")
    assert files(linked) == wanted
    assert (linked / "code/a.py").samefile(app / "code/a.py")

    def no_link(*_):
        raise OSError("another disk")

    monkeypatch.setattr(os, "link", no_link)
    assert (
        files(simulation.app_without_environments(app, tmp_path / "copied")) == wanted
    )


def test_what_cannot_be_copied_is_shown_as_it_is(app, tmp_path, monkeypatch):
    def full(*_):
        raise OSError("no space left")

    monkeypatch.setattr(simulation, "_link", full)
    assert simulation.app_without_environments(app, tmp_path / "copied") == app


def test_the_current_folder_is_run_if_it_holds_an_app(app, tmp_path, monkeypatch):
    (app / "pyproject.toml").write_text("[tool.flwr.app]\n")
    monkeypatch.chdir(app)

    assert simulation.find_app(None, tmp_path) == app
    assert simulation.find_app(str(app), tmp_path) == app


def test_elsewhere_the_installed_packages_app_is_run(app, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    unpacked = types.SimpleNamespace(app_folder=lambda home: home / "app")
    monkeypatch.setitem(sys.modules, "fedllm.deployment.app_folder", unpacked)

    assert simulation.find_app(None, tmp_path / "home") == tmp_path / "home" / "app"
    # Another project's pyproject.toml is no app.
    monkeypatch.chdir(app)
    assert simulation.find_app(None, tmp_path / "home") == tmp_path / "home" / "app"


def test_a_named_folder_without_an_app_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match="holds no Flower app"):
        simulation.find_app(str(tmp_path), tmp_path)


def described(app, run_config=(), clients=3, client_cpus=1):
    return simulation._description(
        simulation.Simulation(app, clients, client_cpus, run_config), app
    )


def test_how_many_train_at_a_time_depends_on_the_runs_own_model(monkeypatch, tmp_path):
    cpus(monkeypatch, 8, 64)
    preset = tmp_path / "preset.toml"
    preset.write_text('model.name = "openlm-research/open_llama_3b_v2"')

    assert described(ROOT, [str(preset)], 20, None)["client_cpus"] == 2
    assert described(ROOT, [], 20, None)["client_cpus"] == 1


def test_the_simulation_gets_the_fused_run_config():
    run = described(ROOT, ["num-server-rounds=2 strategy.fraction-train=0.5"])

    assert run["run_config"]["num-server-rounds"] == 2
    assert run["run_config"]["strategy.fraction-train"] == 0.5
    assert run["run_config"]["seed"] == 42
    assert run["serverapp"] == "fedllm.server_app:app"
    assert (run["num_clients"], run["client_cpus"]) == (3, 1)


@pytest.mark.parametrize(
    ("value", "said"),
    [("no-such-key=1", "no-such-key"), ("a=[b", "format"), ("none.toml", "none.toml")],
)
def test_a_run_config_that_cannot_be_read_is_one_line(value, said):
    with pytest.raises(ConfigError, match=f"--run-config: .*{said}") as error:
        described(ROOT, [value])
    assert "\n" not in str(error.value)


def test_a_simulation_hands_on_no_secret_of_the_user_and_reports_to_nobody(
    tmp_path, monkeypatch
):
    monkeypatch.setenv("RAY_AUTH_TOKEN", "the user's own")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.delenv("FLWR_TELEMETRY_ENABLED", raising=False)
    env = simulation._environment(tmp_path, "/ray")

    assert env["RAY_AUTH_MODE"] == "token"
    assert env["RAY_AUTH_TOKEN"] != "the user's own"
    off = ("FLWR_TELEMETRY_ENABLED", "RAY_USAGE_STATS_ENABLED")
    assert [env[name] for name in off] == ["0", "0"]
    assert env["FLWR_DISABLE_UPDATE_CHECK"] == "1"


def test_an_app_that_flower_cannot_bundle_is_one_line(tmp_path):
    app, home = tmp_path / "app", tmp_path / "home"
    app.mkdir()
    home.mkdir()
    (app / "pyproject.toml").write_text("[tool.flwr.app]\n")

    with pytest.raises(ConfigError, match="Flower cannot bundle the app") as error:
        simulation._unpacked(app, home, dict(os.environ))
    assert "\n" not in str(error.value)
