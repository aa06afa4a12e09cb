import argparse
import os
import types
from pathlib import Path

import psutil
import pytest

from fedllm.commands import simulate

ROOT = Path(__file__).parents[2]
GIB = 2**30


def cpus(monkeypatch, cores, free, clients=20, run_config=None, app=ROOT):
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    memory = types.SimpleNamespace(available=int(free * GIB))
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    args = argparse.Namespace(num_supernodes=clients, run_config=run_config)
    return simulate._fitting_cpus(app, args)


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


def test_with_a_model_of_unknown_size_the_number_is_flower_s(monkeypatch, tmp_path):
    name = 'model.name="openlm-research/open_llama_3b_v2"'
    assert cpus(monkeypatch, 8, 64, run_config=[name]) == 2
    preset = tmp_path / "preset.toml"
    preset.write_text(name)
    assert cpus(monkeypatch, 8, 64, run_config=[str(preset)]) == 2
    assert cpus(monkeypatch, 8, 64, run_config=["num-server-rounds=1"]) == 1


def test_what_flower_is_to_refuse_is_left_to_it(monkeypatch, tmp_path):
    assert cpus(monkeypatch, 8, 64, run_config=["a=[b"]) == 2
    assert cpus(monkeypatch, 8, 64, app=tmp_path) == 2


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
    linked = simulate._without_environments(app, tmp_path / "linked")
    assert files(linked) == wanted
    assert (linked / "code/a.py").samefile(app / "code/a.py")

    def no_link(*_):
        raise OSError("another disk")

    monkeypatch.setattr(os, "link", no_link)
    assert files(simulate._without_environments(app, tmp_path / "copied")) == wanted


def test_what_cannot_be_copied_is_shown_as_it_is(app, tmp_path, monkeypatch):
    def full(*_):
        raise OSError("no space left")

    monkeypatch.setattr(simulate, "_link", full)
    assert simulate._without_environments(app, tmp_path / "copied") == app


@pytest.mark.parametrize("number", ["0", "-1", "1.5", "many"])
def test_no_fraction_of_a_cpu(capsys, number):
    with pytest.raises(SystemExit) as ended:
        simulate.main(["--client-cpus", number])
    assert ended.value.code == 2
    assert "--client-cpus" in capsys.readouterr().err
