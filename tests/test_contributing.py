"""CONTRIBUTING's table "Where does it go": each row names a place that takes additions."""

import inspect
import re
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import get_args, get_type_hints

import numpy as np
import pytest

from fedllm.commands.main import COMMANDS
from fedllm.config import PrivacyConfig, StrategyConfig, TrainConfig
from fedllm.data.embedded import EMBEDDED
from fedllm.data.readers import _READERS
from fedllm.server.privacy_account import _ACCOUNTS, PrivacyAccount
from fedllm.strategy.robust import _aggregator
from fedllm.strategy.server_optimizer import ServerOptimizer
from fedllm.training.dp_sgd import train_privately
from fedllm.training.objectives import OBJECTIVES
from fedllm.training.result import Trained
from fedllm.training.sft import train_adapter

ROOT = Path(__file__).parent.parent


def choices(section, name):
    return get_args(get_type_hints(section)[name])


def table():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    return text.split("## Where does it go", 1)[1].split("\n## ", 1)[0]


def test_every_path_that_the_table_names_is_there():
    paths = re.findall(r"`((?:fedllm|tools|benchmarks|tests)/[\w/.]*)`", table())

    assert len(paths) > 10
    for path in paths:
        assert (ROOT / path).exists(), path


def test_every_aggregator_of_the_config_is_made_and_no_other():
    names = [name for name in choices(StrategyConfig, "aggregator") if name != "mean"]
    made = {
        type(_aggregator(replace(StrategyConfig(), aggregator=n), 5)) for n in names
    }

    assert len(made) == len(names) > 0
    with pytest.raises(ValueError, match="no robust aggregator"):
        _aggregator(StrategyConfig(), 5)


def test_every_server_optimiser_of_the_config_makes_a_step_of_its_own():
    steps = []
    for name in choices(StrategyConfig, "server_optimizer"):
        optimizer = ServerOptimizer(name, 0.9)
        for update in ([1.0, -2.0], [3.0, 0.5]):
            step = optimizer.step(np.array(update), 0.1)
        steps.append(tuple(step))

    assert len(set(steps)) == len(steps)


def test_every_file_format_stands_in_the_page_on_own_data():
    page = (ROOT / "docs" / "own-data-and-models.md").read_text()

    for ending in _READERS:
        assert f"`{ending}`" in page, ending


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_a_parser_of_its_name_and_a_main(name):
    module = import_module(f"fedllm.commands.{name}")

    assert module.parser().prog == f"fedllm {name}"
    assert "arguments" in inspect.signature(module.main).parameters


def test_every_unit_of_privacy_has_an_account_with_all_that_a_run_asks():
    assert set(_ACCOUNTS) == set(choices(PrivacyConfig, "unit"))
    for account in _ACCOUNTS.values():
        assert issubclass(account, PrivacyAccount)
        assert not inspect.isabstract(account), account
    assert {"open", "epsilon", "plan", "outcome"} <= PrivacyAccount.__abstractmethods__


@pytest.mark.parametrize("train", [train_adapter, train_privately])
def test_every_trainer_takes_a_model_examples_and_a_task_and_returns_a_result(train):
    parameters = list(inspect.signature(train).parameters)

    assert parameters[:3] == ["adapted", "examples", "config"]
    assert parameters[-1] == "task"
    assert get_type_hints(train)["return"] is Trained


def test_every_objective_of_the_config_is_in_the_table_and_no_other():
    assert set(OBJECTIVES) == set(choices(TrainConfig, "objective"))


@pytest.mark.parametrize("name", EMBEDDED)
def test_every_embedded_data_set_has_its_splits_and_its_licence(name):
    folder = EMBEDDED[name].folder

    for split in ("train", "validation", "test"):
        assert list(folder.glob(f"{split}*.jsonl")), split
    assert (folder / "LICENSE.md").is_file()
