"""A run that is cut off anywhere, and what goes on from it."""

import json
import logging
import shutil
from typing import Any

import numpy as np
import pytest
from flwr.app import Message, RecordDict

from fedllm.client import cache, message_handler
from fedllm.config import fedllm_home
from fedllm.config_parsing import parse_run_config
from fedllm.errors import AdapterError, ConfigError, PrivacyError
from fedllm.models.location import base_digest
from fedllm.planning.adapter_choice import Choice
from fedllm.privacy.released_rounds import ReleasedRounds
from fedllm.server.startup import _log_judges, _log_unpinned
from fedllm.wire.masking import masked
from fedllm.wire.messages import ARRAYS
from tests.helpers.federations import (
    EVALUATE,
    NO_PRIVACY,
    cut_in_round,
    edit,
    federation,
    kept,
    lines_of,
    read,
    resumed,
    start,
)


def test_real_clients_take_a_resumed_run_s_settings_from_the_server(settings):
    given = {
        **settings,
        **NO_PRIVACY,
        **{"train.local-steps": 3, "train.learning-rate": 2.0},
        **{"num-server-rounds": 3, "strategy.server-optimizer": "momentum"},
    }
    whole = federation(given, message_handler.reply_to)
    whole.run()
    expected = kept(whole.directory.path)

    cut = cut_in_round(given, 2, answer=message_handler.reply_to)
    cache._resident.clear()
    resumed(answer=message_handler.reply_to, first_node=500).run()

    assert kept(cut.directory.path) == expected
    assert lines_of(cut)[3]["clients_rejected"] == 0


def test_the_learning_rates_and_moments_of_a_resumed_run_are_those_of_its_round(quick):
    cut = cut_in_round({**quick, **NO_PRIVACY}, 3)
    run = resumed(first_node=300)

    assert run.progress.next_round == 3
    # Two steps of Adam were made; a fresh one would start from zero.
    assert float(np.abs(run.strategy.averaging.optimizer.second).max()) > 0
    run.run()
    assert lines_of(cut)[3]["learning_rate"] == pytest.approx(0.15)


def test_noise_after_a_crash_is_fresh(quick, tmp_path):
    def zeros(message: Message, context: Any) -> Message:
        arrays = message.content.array_records[ARRAYS]
        return Message(masked(RecordDict({ARRAYS: arrays})), reply_to=message)

    cut = cut_in_round({**quick, "strategy.server-optimizer": "none"}, 2, answer=zeros)
    folder, copies = cut.directory.path, []
    released = tmp_path / "home" / "released" / f"{folder.name}.json"
    for name in ("one", "two"):
        copy = folder.with_name(name)
        shutil.copytree(folder, copy)
        # As if all of FEDLLM_HOME were put back: no copy knows of another.
        released.write_text('{"rounds": [1]}')
        run = resumed(str(copy), answer=zeros)
        run.run()
        copies.append(run.progress.arrays)

    assert not any((copies[0][k] == copies[1][k]).any() for k in copies[0])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"noise_multiplier": 9.0}, "edited: epsilon is"),
        ({"releases": [1]}, "edited: num_rounds is 2"),
        ({"clipping_norm": 9.0}, "edited: chain: its round 1 does not follow"),
        # Of an older version, without a chain.
        (
            {"run": "of-another-run", "chain": None},
            "is of the run 'of-another-run'",
        ),
        (
            {"clipping_norm": 9.0, "chain": None},
            "privacy settings have changed: clipping_norm was 9.0 and is now 1.5",
        ),
    ],
)
def test_a_ledger_that_was_tampered_with_stops_the_run(quick, change, said, tmp_path):
    cut = cut_in_round(quick, 3)
    ReleasedRounds(tmp_path / "home", "of-another-run").begin()
    edit(cut, "privacy.json", lambda content: content.update(change))

    with pytest.raises(PrivacyError, match=said):
        resumed()


def test_auto_is_resolved_before_round_1_said_and_the_same_on_every_client(
    settings, monkeypatch, caplog
):
    def choose(config, population_size):
        assert population_size == 3
        return Choice("lora-core", "because of a test")

    monkeypatch.setattr("fedllm.server.startup.choose_adapter", choose)
    quiet = EVALUATE
    with caplog.at_level(logging.INFO):
        federation, grid = start({**settings, "adapter.kind": "auto", **quiet})
        federation.run()

    folder = federation.directory.path
    config = json.loads((folder / "config.json").read_text())
    origin = json.loads((folder / "peft_final/fedllm.json").read_text())
    lines = [line for line in caplog.messages if "adapter.kind" in line]
    assert lines == ["adapter.kind auto: lora-core; because of a test"]
    assert config["run_config"]["adapter.kind"] == "lora-core"
    assert origin["adapter"]["kind"] == "lora-core"
    assert [line["clients_rejected"] for line in lines_of(federation)] == [0, 0, 0]
    assert lines_of(federation)[2]["client_loss"] is not None
    assert {m.content["config"]["adapter-kind"] for m in grid.sent} == {"lora-core"}


def test_auto_without_evidence_takes_the_default_and_trains(settings, caplog):
    with caplog.at_level(logging.INFO):
        noisy = {"adapter.kind": "auto", "privacy.target-epsilon": 1.0}
        federation, _ = start({**settings, **noisy})
        federation.run()

    assert federation.spec.kind == "ffa-lora"
    assert "nothing was measured near 3 clients" in caplog.text


def test_a_wrong_adapter_is_refused_before_anybody_is_waited_for(settings, monkeypatch):
    def wait(*args):
        raise AssertionError("waited")

    monkeypatch.setattr("fedllm.server.startup.wait_for_clients", wait)
    with pytest.raises(AdapterError, match="adapter.target-modules"):
        start({**settings, "adapter.target-modules": "nonsense"})


def test_a_public_row_that_trains_is_an_error_before_anybody_is_waited_for(
    quick, monkeypatch
):
    monkeypatch.setattr("fedllm.server.startup.wait_for_clients", None)

    with pytest.raises(
        ConfigError, match="data.public-test: 24 of its rows also train"
    ):
        federation({**quick, "data.public-test": quick["data.name"]})


def test_every_message_and_the_run_folder_name_the_base_s_files(quick, tiny_llama):
    run = federation({**quick, **NO_PRIVACY, "num-server-rounds": 1})
    run.run()

    digest = base_digest(str(tiny_llama), fedllm_home())
    assert read(run, "config.json")["base_digest"] == digest
    for message in run.grid.sent:
        assert message.content.config_records["config"]["base-model"] == digest


@pytest.mark.parametrize("pin", ["", "@" + "b" * 40])
def test_a_hub_id_without_a_commit_is_a_warning_that_names_it(caplog, pin):
    config = parse_run_config({"model.name": f"owner/base{pin}", "data.name": "a/b"})

    _log_unpinned(config, "owner/base " + "b" * 40)

    assert ("owner/base is not pinned" in caplog.text) == (not pin)
    assert (f"model.name='owner/base@{'b' * 40}'" in caplog.text) == (not pin)
    assert "data.name: a/b is not pinned" in caplog.text


def test_the_package_s_rows_are_named_as_judges_if_clients_may_have_others(caplog):
    class InMemoryGrid:
        """A simulation's."""

    own, embedded = parse_run_config({"data.name": "own"}), parse_run_config({})
    with caplog.at_level(logging.INFO):
        _log_judges(own, object())
        _log_judges(embedded, InMemoryGrid())
        assert not caplog.messages
        _log_judges(embedded, object())

    assert "wordnet-medical, which come with fedllm, judge this run" in caplog.text
