"""What a run has spent, for every privacy unit."""

import json
import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from flwr.app import Message, MetricRecord, RecordDict

from fedllm.client import message_handler
from fedllm.config_parsing import parse_run_config
from fedllm.errors import PrivacyError
from fedllm.planning.record_noise import record_settings
from fedllm.privacy.record_claims import RecordClaims
from fedllm.wire.masking import masked
from fedllm.wire.messages import ARRAYS, METRICS, array_record
from tests.helpers.federations import (
    cut_in_round,
    federation,
    lines_of,
    read,
    resumed,
    start,
)


def test_what_a_round_says_can_be_recomputed_from_privacy_json_alone(settings):
    import dp_accounting
    from dp_accounting import pld

    federation, _ = start(settings)
    federation.run()
    told = json.loads((federation.directory.path / "privacy.json").read_text())

    relation = dp_accounting.NeighboringRelation.REPLACE_SPECIAL
    accountant = pld.PLDAccountant(relation)
    event = dp_accounting.GaussianDpEvent(told["noise_multiplier"])
    accountant.compose(dp_accounting.SelfComposedDpEvent(event, told["num_rounds"]))

    assert accountant.get_epsilon(told["delta"]) == pytest.approx(
        told["epsilon"], rel=2e-3
    )


def test_training_stops_before_max_epsilon_and_the_run_ends_well(settings, caplog):
    caplog.set_level(logging.INFO)
    limited = {
        **settings,
        "num-server-rounds": 3,
        "privacy.target-epsilon": 0.0,
        "privacy.noise-multiplier": 1.0,
        "privacy.max-epsilon": 6.6,
    }
    federation, _ = start(limited)
    result = federation.run()

    told = json.loads((federation.directory.path / "privacy.json").read_text())
    assert result["num_rounds"] == told["num_rounds"] == 2
    assert told["epsilon"] <= 6.6
    assert "would pass privacy.max-epsilon 6.6" in caplog.text


RECORD = {"privacy.unit": "record", "train.batch-size": 2}


def test_a_record_level_run_says_what_its_worst_and_median_client_spent(
    settings, caplog
):
    caplog.set_level(logging.INFO)
    federation, _ = start({**settings, **RECORD})
    federation.run()

    folder = federation.directory.path
    privacy = json.loads((folder / "privacy.json").read_text())
    lines = lines_of(federation)
    assert privacy["unit"] == "record"
    assert privacy["neighbouring_relation"] == "add-or-remove one record"
    assert 7.9 < privacy["epsilon_median"] <= privacy["epsilon"] <= 8.0
    assert privacy["num_rounds"] == 2 and privacy["num_clients_reported"] == 3
    assert any("cannot check" in line for line in privacy["not_covered"])
    assert [line["epsilon"] for line in lines][-1] == privacy["epsilon"]
    assert 0 < lines[1]["epsilon"] < lines[2]["epsilon"]
    assert [line["train_loss"] for line in lines] == [None] * 3
    assert privacy["statement"] in (folder / "README.md").read_text()
    assert "each client calibrates its own noise" in caplog.text
    assert "for the worst client" in caplog.text
    assert not list((folder / "logs").glob("*"))


def test_every_key_of_a_client_level_privacy_json_is_in_that_of_records(settings):
    client_level, _ = start(settings)
    record_level, _ = start({**settings, **RECORD})

    one, two = (
        json.loads((f.directory.path / "privacy.json").read_text())
        for f in (client_level, record_level)
    )

    assert set(one) <= set(two)
    assert two["epsilon"] is None and "not known" in two["statement"]


def test_a_killed_record_level_run_still_says_what_its_rounds_cost(
    settings, monkeypatch
):
    federation, _ = start({**settings, **RECORD})
    monkeypatch.setattr(
        federation,
        "_evaluate_clients",
        lambda r: (_ for _ in ()).throw(KeyboardInterrupt),
    )

    with pytest.raises(KeyboardInterrupt):
        federation.run()

    privacy = json.loads((federation.directory.path / "privacy.json").read_text())
    assert privacy["releases"] == [1]
    assert 0 < privacy["epsilon"] < 8.0


def test_a_record_level_run_stops_where_every_client_has_spent_its_budget(
    settings, caplog
):
    caplog.set_level(logging.INFO)
    # Nobody is waited for; a busy machine may take long over an answer.
    told = {**settings, **RECORD, "num-server-rounds": 5}
    told["strategy.round-timeout"] = 120.0

    def answer(message, context):
        # Each takes part in one round of a plan for one.
        context.run_config = {**context.run_config, "num-server-rounds": 1}
        return message_handler.reply_to(message, context)

    federation, _ = start(told, answer)
    federation.run()

    assert federation.progress.last_round == 2
    assert "every client has spent its budget" in caplog.text
    assert lines_of(federation)[-1]["clients_rejected"] == 3


def test_under_record_every_client_counts_once_whatever_it_claims(settings):
    def answers(claim):
        def answer(message, context):
            arrays = message.content.array_records[ARRAYS].to_numpy_ndarrays()
            names = list(message.content.array_records[ARRAYS])
            first = message.metadata.dst_node_id == 100
            moved = {
                n: a + (1.0 if first else 0.0)
                for n, a in zip(names, arrays, strict=True)
            }
            metrics = {"epsilon": 1.0, "train-loss": 5.0}
            metrics["num-examples"] = claim if first else 1
            content = RecordDict({ARRAYS: array_record(moved)})
            content[METRICS] = MetricRecord(metrics)
            return Message(masked(content), reply_to=message)

        federation, _ = start({**settings, **RECORD, "num-server-rounds": 1}, answer)
        federation.run()
        assert federation.strategy.round.train_loss is None
        return federation.progress.arrays

    modest, boastful = answers(1), answers(1000)

    for name in modest:
        np.testing.assert_array_equal(modest[name], boastful[name])
        assert float(np.abs(modest[name]).max()) > 0.1


@pytest.mark.parametrize("claim", [float("nan"), float("inf"), -1.0, 3, None])
def test_an_update_whose_epsilon_is_not_a_number_makes_the_runs_unknown(
    settings, claim
):
    def answer(message, context):
        content = RecordDict({ARRAYS: message.content.array_records[ARRAYS]})
        if claim is not None:
            content[METRICS] = MetricRecord({"epsilon": claim})
        return Message(masked(content), reply_to=message)

    federation, _ = start({**settings, **RECORD, "num-server-rounds": 1}, answer)
    federation.run()

    privacy = json.loads((federation.directory.path / "privacy.json").read_text())
    assert privacy["epsilon"] is None
    assert "not bounded" in privacy["statement"]
    assert privacy["strength"] == "none to speak of"


def test_record_level_clients_go_on_with_the_plan_and_the_ledger_of_the_run(settings):
    given = {**settings, "privacy.unit": "record", "train.batch-size": 2}
    given["num-server-rounds"] = 3
    cut = cut_in_round(given, 3, answer=message_handler.reply_to)
    before = read(cut, "privacy.json")
    resumed(answer=message_handler.reply_to, first_node=500).run()

    told = read(cut, "privacy.json")
    assert before["releases"] == [1, 2]
    assert told["releases"] == [1, 2, 3]
    assert told["num_clients_reported"] == 3
    # Three rounds of a plan for three: a plan made anew would have spent less.
    assert before["epsilon"] < 7.0 < 7.9 < told["epsilon"] <= 8.0


def test_a_resumed_run_never_reports_less_than_its_clients_claimed_before(settings):
    def claims(epsilon: float) -> Callable[..., Any]:
        def answer(message: Message, context: Any) -> Message:
            content = RecordDict({ARRAYS: message.content.array_records[ARRAYS]})
            partition = context.node_config["partition-id"]
            content[METRICS] = MetricRecord({"epsilon": epsilon + partition})
            return Message(masked(content), reply_to=message)

        return answer

    given = {**settings, "privacy.unit": "record", "num-server-rounds": 3}
    cut = cut_in_round(given, 3, answer=claims(4.0))
    assert read(cut, "privacy.json")["epsilon"] == 6.0
    run = resumed(answer=claims(1.0), first_node=500)
    assert (run.account.claims.worst, run.account.claims.median) == (6.0, 5.0)
    run.run()

    told = read(cut, "privacy.json")
    assert told["epsilon"] == 6.0
    assert told["epsilon_median"] == 2.0
    assert told["num_clients_reported"] == 3


def test_a_client_that_comes_back_under_another_id_is_one_client(settings):
    def answer(message: Message, context: Any) -> Message:
        if message.metadata.dst_node_id == 102:
            run.grid.contexts[900] = run.grid.contexts.pop(102)
        content = RecordDict({ARRAYS: message.content.array_records[ARRAYS]})
        partition = context.node_config["partition-id"]
        content[METRICS] = MetricRecord({"epsilon": 1.0 + partition})
        return Message(masked(content), reply_to=message)

    run = federation({**settings, "privacy.unit": "record"}, answer)
    run.run()

    told = read(run, "privacy.json")
    assert told["num_clients_reported"] == 3
    assert (told["epsilon"], told["epsilon_median"]) == (3.0, 2.0)


@pytest.mark.parametrize("unit", ["client", "record"])
def test_a_delta_that_weakens_the_promise_is_warned_of_before_round_1(settings, unit):
    large = {**settings, "privacy.unit": unit, "privacy.delta": 1e-3}

    warned = [text for level, text in start(large)[0].account.plan() if level > 20]

    assert "privacy.delta: delta 0.001 is above 1e-05" in warned


def test_the_claims_of_records_name_public_rows_and_no_second_epsilon(settings):
    federation, _ = start({**settings, **RECORD})

    privacy = json.loads((federation.directory.path / "privacy.json").read_text())
    assert "epsilon_add_or_remove" not in privacy
    assert any("rows declared public" in line for line in privacy["not_covered"])


def test_claims_by_person_name_the_person_and_what_two_clients_cost(tmp_path):
    config = parse_run_config({"privacy.unit": "record", "data.person-column": "who"})
    settings = record_settings(config, 4, 1000)
    claims = RecordClaims.create(tmp_path / "privacy.json", settings)
    assert claims.as_dict()["epsilon_two_clients"] is None
    claims.note_round(1, {7: 2.0, 8: 3.0})

    content = json.loads((tmp_path / "privacy.json").read_text())
    assert content["epsilon_two_clients"] == 6.0
    assert "(by 'who')" in content["statement"]
    assert "epsilon 6.00 at delta 2e-05 for a person with rows" in content["statement"]
    assert content["neighbouring_relation"].endswith("one person in one client")
    assert not any("bound is for one row" in line for line in content["not_covered"])
    with pytest.raises(PrivacyError, match="person_column was 'who' and is now ''"):
        RecordClaims.load(
            tmp_path / "privacy.json", replace(settings, person_column="")
        )


def test_claims_of_rows_of_before_are_read(tmp_path):
    settings = record_settings(parse_run_config({"privacy.unit": "record"}), 4, 1000)
    path = tmp_path / "privacy.json"
    RecordClaims.create(path, settings).note_round(1, {7: 2.0})
    content = json.loads(path.read_text())
    assert any("bound is for one row" in line for line in content["not_covered"])
    del content["person_column"], content["epsilon_two_clients"]
    path.write_text(json.dumps(content))

    assert RecordClaims.load(path, settings).worst == 2.0
