"""The model card: what the hub reads, and what a person should know."""

import json

import pytest
import yaml

from fedllm.reporting.report import write_report
from tests.helpers.sample_runs import write_run


def card(folder):
    write_report(folder)
    _, front, text = (folder / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(front), text


def test_the_built_in_model_and_data_are_named_with_their_licences(tmp_path):
    front, text = card(write_run(tmp_path / "run"))

    assert front["base_model"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert front["base_model_relation"] == "adapter"
    assert front["license"] == "apache-2.0"
    assert set(front["tags"]) >= {"federated-learning", "differential-privacy", "lora"}
    assert "WordNet 3.0" in text and "not medical advice" in text
    assert "2.960" in text and "Client-level differential privacy" in text


def test_what_is_not_known_is_not_claimed(tmp_path):
    quiet = {"privacy__unit": "none", "privacy__target_epsilon": 0.0}
    own = {"model__name": "/my/model", "data__name": "/my/rows.jsonl"}
    front, text = card(write_run(tmp_path / "run", **quiet, **own))

    assert "license" not in front and "base_model" not in front
    assert "differential-privacy" not in front["tags"]
    assert text.count("not known here") == 2


def test_a_pinned_base_is_named_as_the_hub_does_with_its_commit(tmp_path):
    folder = write_run(tmp_path / "run", model__name="owner/base@" + "a" * 40)
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "base": "owner/base@" + "a" * 40,
        "base_digest": "owner/base " + "a" * 40,
    }
    (folder / "config.json").write_text(json.dumps(config))
    front, text = card(folder)

    assert front["base_model"] == "owner/base"
    assert f"| its commit, or hashes | owner/base {'a' * 40} |" in text


@pytest.mark.parametrize("kind", ["ia3", "vera", "lora-core"])
def test_the_method_is_peft_s_name(tmp_path, kind):
    front, _ = card(write_run(tmp_path / "run", adapter__kind=kind))

    assert ({"lora-core": "lora"}.get(kind, kind)) in front["tags"]


@pytest.mark.parametrize(
    ("change", "is_tagged"),
    [
        ({}, True),
        ({"privacy__target_epsilon": 50.0}, True),
        ({"privacy__target_epsilon": 60.0}, False),
        ({"privacy__target_epsilon": 40.0, "privacy__delta": 1e-3}, False),
    ],
)
def test_only_what_is_bounded_is_tagged_as_private(tmp_path, change, is_tagged):
    front, _ = card(write_run(tmp_path / "run", **change))

    assert ("differential-privacy" in front["tags"]) is is_tagged


def test_a_run_whose_clients_said_nothing_is_not_tagged_as_private(tmp_path):
    folder = write_run(tmp_path / "run")
    edited = json.loads((folder / "privacy.json").read_text())
    (folder / "privacy.json").write_text(json.dumps({**edited, "epsilon": None}))

    assert "differential-privacy" not in card(folder)[0]["tags"]
