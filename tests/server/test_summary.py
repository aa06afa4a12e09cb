"""What a run logs of its result and its privacy."""

import json
import logging
import os

import pytest

from fedllm.config_parsing import parse_run_config
from fedllm.server import summary
from tests.helpers.federations import start


def test_a_model_that_got_worse_is_not_recommended(settings, caplog, monkeypatch):
    caplog.set_level(logging.INFO)
    federation, _ = start(settings)
    # The random model's loss moves either way: stand in for one that gets worse.
    losses = iter([3.0, 3.05, 3.2, 3.1])
    monkeypatch.setattr(federation.public, "validation_loss", lambda _: next(losses))
    result = federation.run()

    assert result["recommended"] == "base"
    assert result["test_loss_after"] == result["test_loss_before"]
    assert "no round beat the base" in caplog.text
    assert not (federation.directory.path / "peft_best").exists()


def test_an_unprotected_setting_says_what_it_is_worth(settings, caplog):
    caplog.set_level(logging.INFO)
    weak = {
        **settings,
        "privacy.target-epsilon": 0.0,
        "privacy.noise-multiplier": 0.02,
    }
    federation, _ = start(weak)
    federation.run()

    told = json.loads((federation.directory.path / "privacy.json").read_text())
    assert told["strength"] == "none to speak of"
    assert "no protection to speak of" in caplog.text


def test_the_end_of_a_run_says_that_other_rows_judged_it_if_that_may_be(caplog):
    class InMemoryGrid:
        """A simulation's."""

    own, embedded = parse_run_config({"data.name": "own"}), parse_run_config({})
    summary.log_judges(own, object())
    summary.log_judges(embedded, InMemoryGrid())
    assert not caplog.messages

    summary.log_judges(embedded, object())

    assert "public rows of wordnet-medical" in caplog.text
    assert "say nothing of those" in caplog.text
    assert caplog.records[0].levelname == "WARNING"


@pytest.mark.parametrize(
    ("folder", "typed"), [(".", ".venv/bin/fedllm"), ("elsewhere", "{}/fedllm")]
)
def test_the_command_to_type_needs_no_activated_environment(
    folder, typed, tmp_path, monkeypatch
):
    programs = tmp_path / ".venv" / "bin"
    (tmp_path / "elsewhere").mkdir()
    programs.mkdir(parents=True)
    (programs / "fedllm").touch(mode=0o755)
    monkeypatch.chdir(tmp_path / folder)
    monkeypatch.setattr(summary.sys, "executable", str(programs / "python"))
    # As the server's process of a simulation has it.
    monkeypatch.setenv("PATH", str(programs), prepend=os.pathsep)

    assert summary.command() == typed.format(programs)
