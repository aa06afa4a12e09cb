"""The rehearsal: planted where it says, in no run's folder, and measured for each model."""

import json

import pytest

from fedllm.auditing.planted import make_planted
from fedllm.commands import audit
from fedllm.commands.memorisation import rehearse, write_rehearsal
from fedllm.config import fedllm_home, flat
from fedllm.config_parsing import parse_run_config
from fedllm.data.partitions import partition
from fedllm.data.rows import load_rows
from fedllm.errors import ConfigError
from tests.helpers.federations import settings

__all__ = ["settings"]


@pytest.fixture
def config(settings):
    return parse_run_config(
        {
            **settings,
            "data.public-validation": "",
            "data.public-test": "",
            "num-server-rounds": 1,
            "strategy.round-timeout": 900.0,
        }
    )


def test_each_client_has_its_own_rows_and_its_own_sentences(config, tmp_path):
    planted = make_planted(3, range(2), config.seed)
    rehearsed = write_rehearsal(config, 2, planted, 4, tmp_path)
    before = load_rows(config.data)
    shared = [
        partition(rehearsed.data, load_rows(rehearsed.data), i, 2, 1) for i in (0, 1)
    ]
    answers = [rows["response"][:] for rows in shared]

    assert sorted(map(len, answers)) == [12 + 4, 12 + 8]
    long, short = sorted(answers, key=len, reverse=True)
    assert [long.count(one.answer) for one in planted] == [4, 0, 4]
    assert [short.count(one.answer) for one in planted] == [0, 4, 0]
    original = {a for rows in answers for a in rows} - {p.answer for p in planted}
    assert original == set(before["response"][:])


def test_the_rehearsal_measures_base_and_both_twins_and_leaves_no_run(config):
    said = []
    found = rehearse(config, 2, 2, 3, said.append)

    assert list(found["models"]) == ["base", "without privacy", "private"]
    assert [line.partition(":")[0] for line in said] == list(found["models"])
    for memory in found["models"].values():
        assert 0 <= memory["exposure"] <= found["most"]
        assert memory["exposure_low"] <= memory["exposure"] <= memory["exposure_high"]
    assert not (fedllm_home() / "runs").exists()
    assert not (fedllm_home() / "ledgers" / "node").exists()


def test_a_model_that_trained_on_a_sentence_long_enough_remembers_it(settings):
    config = parse_run_config(
        {
            **settings,
            "privacy.unit": "none",
            "privacy.target-epsilon": 0.0,
            "data.public-validation": "",
            "data.public-test": "",
            "num-server-rounds": 1,
            "adapter.kind": "lora",
            "train.optimizer": "adamw",
            "train.learning-rate": 0.03,
            "train.learning-rate-min": 0.03,
            "train.local-steps": 40,
            "strategy.round-timeout": 900.0,
        }
    )
    found = rehearse(config, 1, 1, 40, lambda line: None)["models"]

    assert list(found) == ["base", "without privacy"]
    assert found["without privacy"]["exposure"] >= 5.0 > found["base"]["exposure"]


def test_the_command_writes_what_the_dossier_reads(
    config, tmp_path, capsys, monkeypatch
):
    content = {"models": {}, "num_planted": 2}
    asked = []

    def stand_in(*given):
        asked.append(given)
        return content

    monkeypatch.setattr("fedllm.commands.memorisation.rehearse", stand_in)
    folder = tmp_path / "run"
    folder.mkdir()
    kept = {"run_config": flat(config), "num_clients": 5}
    (folder / "config.json").write_text(json.dumps(kept))
    audit.main(["--run", str(folder), "--memorised", "--canaries", "2"])

    assert json.loads((folder / "memorised.json").read_text()) == content
    assert asked[0][1:4] == (5, 2, 1)
    out = capsys.readouterr().out
    assert "2 sentences, each planted once at one of 5 clients" in out
    with pytest.raises(SystemExit, match="must be at least 1"):
        audit.main(["--run", str(folder), "--memorised", "--canaries", "0"])


def test_what_cannot_be_rehearsed_is_one_line(settings):
    texts = parse_run_config({**settings, "data.format": "text"})
    with pytest.raises(ConfigError, match="data.format: planted sentences"):
        rehearse(texts, 2, 1, 1, lambda line: None)
    sealed = parse_run_config(
        {**settings, "privacy.trust": "trustees", "privacy.trustees": "a,b"}
    )
    with pytest.raises(ConfigError, match="a rehearsal has no trustees"):
        rehearse(sealed, 2, 1, 1, lambda line: None)
