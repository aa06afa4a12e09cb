"""The run config: defaults, presets, and that every key is used."""

import re
import tomllib
from pathlib import Path

import pytest

from fedllm.config import RunConfig, fedllm_home, flat
from fedllm.config_parsing import parse_run_config

ROOT = Path(__file__).parent.parent


def flatten(section: dict, prefix: str = "") -> dict:
    out = {}
    for key, value in section.items():
        if isinstance(value, dict):
            out |= flatten(value, f"{prefix}{key}.")
        else:
            out[prefix + key] = value
    return out


def read_toml(path: Path) -> dict:
    return tomllib.loads(path.read_text("utf-8"))


def test_pyproject_states_every_key_with_its_default():
    stated = flatten(
        read_toml(ROOT / "pyproject.toml")["tool"]["flwr"]["app"]["config"]
    )

    assert stated == flat(RunConfig())
    assert {k: type(v) for k, v in stated.items()} == {
        k: type(v) for k, v in flat(RunConfig()).items()
    }


def test_every_key_is_read_somewhere_in_the_package():
    code = "\n".join(
        path.read_text("utf-8")
        for path in (ROOT / "fedllm").rglob("*.py")
        if path.name not in ("config.py", "config_rules.py")
    )

    unread = [
        key
        for key in flat(RunConfig())
        if f".{key.rpartition('.')[2].replace('-', '_')}" not in code
    ]

    assert unread == []


@pytest.mark.parametrize("preset", sorted((ROOT / "configs").glob("*.toml")))
def test_a_preset_is_valid_and_its_keys_are_known_to_flower(preset: Path):
    values = flatten(read_toml(preset))

    parse_run_config({**flat(RunConfig()), **values})

    assert set(values) <= set(flat(RunConfig()))


@pytest.mark.parametrize("preset", sorted((ROOT / "configs").glob("*.toml")))
def test_a_preset_says_its_whole_command(preset: Path):
    text = preset.read_text("utf-8")

    clients = read_toml(preset)["strategy"]["num-clients"]

    assert f"--run-config configs/{preset.name}" in text
    assert re.search(rf"num-supernodes[ =]{clients}\b", text)


def test_a_sealed_run_names_its_trustees_in_order():
    config = parse_run_config(
        {"privacy.trust": "trustees", "privacy.trustees": " c, a ,b-1.x"}
    )

    assert config.is_sealed
    assert config.trustees == ("c", "a", "b-1.x")
    assert config.least_trustees == 3
    assert not parse_run_config({}).is_sealed


def test_the_home_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("FEDLLM_HOME", str(tmp_path / "elsewhere"))

    assert fedllm_home() == tmp_path / "elsewhere"
