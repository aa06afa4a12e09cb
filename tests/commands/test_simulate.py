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


@pytest.mark.parametrize("number", ["0", "-1", "1.5", "many"])
def test_no_fraction_of_a_cpu(capsys, number):
    with pytest.raises(SystemExit) as ended:
        simulate.main(["--client-cpus", number])
    assert ended.value.code == 2
    assert "--client-cpus" in capsys.readouterr().err
