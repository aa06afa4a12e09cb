"""Rows that train and rows that are declared public."""

import json
from pathlib import Path

import pytest

from fedllm.config import DataConfig
from fedllm.config_parsing import parse_run_config
from fedllm.data.overlap import public_rows_among, require_no_public_row_trains
from fedllm.data.rows import load_public
from fedllm.errors import ConfigError
from tests.helpers.federations import NO_PRIVACY
from tests.helpers.rows import write_jsonl, write_rows


@pytest.fixture
def names(tmp_path):
    return {
        "data.name": write_rows(tmp_path / "train.jsonl", 24),
        "data.public-validation": write_rows(tmp_path / "validation.jsonl", 6, 100),
        "data.public-test": write_rows(tmp_path / "test.jsonl", 5, 200),
    }


def test_rows_of_three_files_without_a_common_row_are_taken(names):
    require_no_public_row_trains(parse_run_config(names))
    require_no_public_row_trains(parse_run_config({}))


@pytest.mark.parametrize("unit", ["client", "record"])
@pytest.mark.parametrize("key", ["data.public-validation", "data.public-test"])
def test_one_public_row_that_trains_is_an_error_under_dp(names, tmp_path, key, unit):
    names[key] = write_rows(tmp_path / "public.jsonl", 3, 23)

    with pytest.raises(ConfigError, match=f"{key}: 1 of its rows also train"):
        require_no_public_row_trains(parse_run_config({**names, "privacy.unit": unit}))
    require_no_public_row_trains(parse_run_config({**names, **NO_PRIVACY}))


def test_one_file_for_all_three_is_an_error(names):
    names = dict.fromkeys(names, names["data.name"])

    with pytest.raises(ConfigError, match="24 of its rows also train"):
        require_no_public_row_trains(parse_run_config(names))


def test_another_column_form_or_blank_makes_no_other_row(names, tmp_path):
    row = json.loads(Path(names["data.name"]).read_text().splitlines()[0])
    row = {
        "instruction": row["instruction"] + "  ",
        "n": 7,
        "response": row["response"],
    }
    path = write_jsonl(tmp_path / "public.jsonl", [row])

    with pytest.raises(ConfigError, match="1 of its rows also train"):
        require_no_public_row_trains(
            parse_run_config({**names, "data.public-test": str(path)})
        )


@pytest.mark.parametrize("name", ["owner/rows", "/nowhere/rows.jsonl"])
def test_rows_that_are_not_on_this_machine_are_the_clients_own(names, name):
    require_no_public_row_trains(parse_run_config({**names, "data.name": name}))


def test_a_node_s_own_rows_are_compared_with_the_package_s_public_ones():
    config = DataConfig()
    public = load_public(config, "validation")[0]
    rows = [{"instruction": "What?", "response": "That."}, None, public, {"x": 1}]

    assert public_rows_among(config, rows) == {2}


def test_a_node_opens_no_path_that_a_run_config_names(names):
    named = parse_run_config(
        {
            "data.public-validation": names["data.public-validation"],
            "data.public-test": "/nowhere/rows.jsonl",
        }
    )
    rows = [
        json.loads(Path(names["data.public-validation"]).read_text().split("\n")[0])
    ]

    assert public_rows_among(named.data, rows) == set()
