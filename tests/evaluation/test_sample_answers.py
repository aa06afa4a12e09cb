"""Sample answers of the base and the tuned model."""

import json

import pytest

from fedllm.runs.state import read_state
from tests.helpers.federations import start


@pytest.fixture
def quick(settings):
    return {**settings, "num-server-rounds": 1, "privacy.noise-probe": False}


def test_a_finished_run_has_answers_of_both_models_to_public_test_rows(quick):
    federation, _ = start(quick)
    federation.run()

    folder = federation.directory.path
    content = json.loads((folder / "answers.json").read_text())
    page = (folder / "report.html").read_text()
    assert content["server_round"] == 1 and len(content["answers"]) == 3
    for answer in content["answers"]:
        number = int(answer["question"].split()[-1].rstrip("?"))
        assert 200 <= number < 205
        assert str(number) in answer["reference"]
        assert isinstance(answer["base"], str) and isinstance(answer["tuned"], str)
    assert content["answers"][0]["question"] in page
    assert read_state(folder, finished=False) == ("finished", None)


def test_without_public_rows_there_are_no_sample_answers(quick):
    alone = {**quick, "data.public-validation": "", "data.public-test": ""}
    federation, _ = start(alone)
    federation.run()

    assert not (federation.directory.path / "answers.json").exists()
    assert (federation.directory.path / "report.html").exists()
