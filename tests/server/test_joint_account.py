"""A run with one noise for all records, from the question before round 1 to its account."""

import json
import logging
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Message, MetricRecord, RecordDict

from fedllm.client import message_handler
from fedllm.errors import ConfigError, FederationError, PrivacyError
from fedllm.wire.masking import masked
from fedllm.wire.messages import (
    ARRAYS,
    DECLARED_ROWS,
    METRICS,
    array_record,
    error_content,
)
from tests.helpers.federations import (
    JOINT,
    Killed,
    cut_in_round,
    edit,
    federation,
    lines_of,
    read,
    resumed,
    start,
)
from tests.helpers.rows import write_jsonl


def summer(message, context):
    """A client that declares eight rows, and whose sums are small integers."""
    if message.metadata.message_type == "query":
        content = RecordDict({METRICS: MetricRecord({DECLARED_ROWS: 8})})
        return Message(masked(content), reply_to=message)
    arrays = message.content.array_records[ARRAYS]
    sums = {
        name: np.full(tuple(value.shape), 1000, np.int64)
        for name, value in arrays.items()
    }
    return Message(masked(RecordDict({ARRAYS: array_record(sums)})), reply_to=message)


def test_a_joint_run_trains_and_states_the_epsilon_of_a_row(settings):
    run, grid = start({**settings, **JOINT})

    run.run()

    content = read(run, "privacy.json")
    assert content["declared_rows"] == [8, 8, 8]
    assert content["sampling_probability"] == 6 / 24
    assert content["releases"] == [1, 2]
    assert content["statement"].startswith("Record-level differential privacy")
    assert "is trusted" in content["statement"]
    kinds = [message.metadata.message_type for message in grid.sent]
    assert kinds == ["query"] * 3 + ["train"] * 6
    assert lines_of(run)[-1]["epsilon"] == content["epsilon"]
    assert lines_of(run)[-1]["train_loss"] is None


def test_q_and_the_divisor_are_fixed_before_round_1_and_clients_may_vanish(quick):
    def answer(message, context):
        is_gone = context.node_config["partition-id"] > 0
        if message.metadata.message_type == "train" and is_gone:
            return Message(error_content("out-of-memory", None), reply_to=message)
        return summer(message, context)

    run = federation({**quick, **JOINT}, answer)
    run.run()

    content = read(run, "privacy.json")
    assert content["sampling_probability"] == 6 / 24
    assert content["expected_batch_size"] == 6
    assert content["releases"] == [1, 2, 3]


def test_a_client_that_declares_nothing_is_asked_no_more(quick, caplog):
    asked = []

    def answer(message, context):
        number = context.node_config["partition-id"]
        asked.append((message.metadata.message_type, number))
        if number == 1:
            return Message(error_content("bad-config", None), reply_to=message)
        return summer(message, context)

    run = federation({**quick, **JOINT}, answer)
    run.run()

    assert ("train", 1) not in asked and ("train", 2) in asked
    assert read(run, "privacy.json")["declared_rows"] == [8, 8]


def test_fewer_declared_rows_than_a_batch_stop_before_round_1(quick):
    told = {**quick, **JOINT, "train.gradient-accumulation": 25}

    with pytest.raises(ConfigError, match="24 rows together"):
        federation(told, summer)


def test_nobody_who_declares_is_one_clear_line(quick):
    def answer(message, context):
        return Message(error_content("bad-config", None), reply_to=message)

    with pytest.raises(FederationError, match="0 of 3 did"):
        federation({**quick, **JOINT}, answer)


def test_a_resumed_run_asks_nobody_anew_and_pays_for_no_step_twice(quick):
    def asked_anew(message, context):
        if message.metadata.message_type == "query":
            raise Killed
        return summer(message, context)

    cut = cut_in_round({**quick, **JOINT}, 2, answer=summer)
    run = resumed(answer=asked_anew)
    run.run()

    assert cut.directory.path == run.directory.path
    content = read(run, "privacy.json")
    assert content["releases"] == [1, 2, 3]
    assert content["declared_rows"] == [8, 8, 8]


def test_other_rows_than_were_declared_are_an_edited_ledger(quick):
    run = cut_in_round({**quick, **JOINT}, 2, answer=summer)

    def more(content):
        content["declared_rows"] = [80, 80, 80]

    edit(run, "privacy.json", more)
    with pytest.raises(PrivacyError, match="edited"):
        resumed(answer=summer)


def test_the_log_says_what_is_spent_and_by_what_numbers(settings, caplog):
    caplog.set_level(logging.INFO)
    run, _ = start({**settings, **JOINT}, message_handler.reply_to)
    run.run()

    assert "2 steps will spend epsilon" in caplog.text
    assert "one noise for all 24 declared rows" in caplog.text
    assert "3 clients declared 24 together" in caplog.text
    assert "for each record, add-or-remove one record" in caplog.text


def test_a_run_by_person_counts_and_names_persons(settings, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    lines = Path(settings["data.name"]).read_text().splitlines()
    rows = [{**json.loads(line), "who": n // 2} for n, line in enumerate(lines)]
    path = write_jsonl(tmp_path / "persons.jsonl", rows)
    by_person = {"data.name": str(path), "data.person-column": "who"}
    run, _ = start({**settings, **JOINT, **by_person}, message_handler.reply_to)
    run.run()

    content = read(run, "privacy.json")
    assert content["declared_rows"] == [4, 4, 4]
    assert content["sampling_probability"] == 6 / 12
    assert content["epsilon"] < content["epsilon_two_clients"]
    assert "one noise for all 12 declared persons" in caplog.text
    assert "3 clients declared 12 together" in caplog.text
    assert "rows at two clients" in caplog.text
