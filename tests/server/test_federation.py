"""The whole round in one process, on a tiny random model of OpenLLaMA's kind."""

import json
import logging
from pathlib import Path

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict

from fedllm.client import message_handler
from fedllm.wire.masking import WIRE, masked
from fedllm.wire.messages import ARRAYS, METRICS, array_record, error_content
from tests.helpers.client_replies import values
from tests.helpers.federations import (
    EVALUATE,
    NO_PRIVACY,
    SECRET_COHORTS,
    lines_of,
    start,
)
from tests.helpers.flower_messages import as_sent
from tests.helpers.rows import MARKER


def test_a_private_run_leaves_a_whole_run_folder(settings, drawings, tmp_path):
    federation, grid = start(settings)
    result = federation.run()

    folder = federation.directory.path
    privacy = json.loads((folder / "privacy.json").read_text())
    config = json.loads((folder / "config.json").read_text())
    lines = lines_of(federation)
    assert {p.name for p in folder.iterdir()} >= {
        "config.json",
        "metrics.jsonl",
        "privacy.json",
        "result.json",
        "peft_1",
        "peft_2",
        "peft_final",
        "report.html",
        "README.md",
    }
    assert privacy["statement"] in (folder / "README.md").read_text()
    assert (folder / "report.html").read_text().count("<svg") >= 3
    assert (tmp_path / "home/runs/latest").resolve() == folder.resolve()
    assert 7.9 < privacy["epsilon"] <= 8.0
    assert privacy["noise_probe"]["before"] == pytest.approx(
        lines[0]["validation_loss"]
    )
    assert [line["server_round"] for line in lines] == [0, 1, 2]
    assert [line["epsilon"] for line in lines][-1] == privacy["epsilon"]
    assert [line["train_loss"] for line in lines] == [None] * 3
    assert [line["client_seconds"] for line in lines] == [None] * 3
    assert lines[1]["clients_asked"] == lines[1]["clients_answered"] == 3
    assert lines[1]["megabytes_up"] > 0
    assert config["run_config"]["model.name"] == settings["model.name"]
    assert json.loads((folder / "result.json").read_text()) == result
    assert result["test_examples"] == 5
    assert set(grid.pulls) == {1}  # one message id a call


def test_training_without_dp_lowers_the_loss_and_recommends_the_best_round(settings):
    federation, _ = start(
        {**settings, **NO_PRIVACY, "train.local-steps": 6, "train.learning-rate": 5.0}
    )
    result = federation.run()

    lines = lines_of(federation)
    losses = [line["validation_loss"] for line in lines]
    best = int(np.argmin(losses))
    assert min(losses[1:]) < losses[0] - 0.1
    assert result["best_round"] == best > 0
    assert Path(result["recommended"]).name == "peft_best"
    assert result["test_loss_after"] < result["test_loss_before"]
    assert lines[1]["train_loss"] > 0
    told = lines[1]["client_seconds"]
    assert list(told) == ["load", "tokenise", "build", "train", "encode"]
    assert 0 < told["train"] <= lines[1]["seconds"]["train"]
    assert [line["epsilon"] for line in lines] == [None] * 3
    told = json.loads((federation.directory.path / "privacy.json").read_text())
    assert told["epsilon"] is None and told["unit"] == "none"


def test_the_same_seed_gives_the_same_adapter_in_any_order_of_arrival(settings):
    finals = []
    for order in (list, lambda ids: ids[::-1]):
        federation, _ = start({**settings, **NO_PRIVACY}, order=order)
        federation.run()
        finals.append(federation.progress.arrays)

    assert all((finals[0][k] == finals[1][k]).all() for k in finals[0])


def test_with_dp_two_runs_never_make_the_same_adapter(settings):
    finals = []
    for _ in range(2):
        federation, _ = start(settings)
        federation.run()
        finals.append(federation.progress.arrays)

    assert not any((finals[0][k] == finals[1][k]).any() for k in finals[0])


def test_one_client_twice_and_one_round_is_the_trainers_own_adapter(settings, tmp_path):
    # Two nodes that hold the same file and report the same partition: the mean of two
    # equal updates is the update.
    path = settings["data.name"]
    nodes = [{"data-path": path, "partition-id": 5}] * 2
    one_round = {**settings, **NO_PRIVACY, "num-server-rounds": 1}
    federation, grid = start(one_round, nodes=nodes)
    federation.run()

    message = grid.sent[0]
    reply = message_handler.reply_to(message, next(iter(grid.contexts.values())))
    sent = values(reply, federation.progress.arrays)

    for name, value in federation.progress.arrays.items():
        np.testing.assert_allclose(value, sent[name], atol=2e-9)


def test_nothing_of_a_clients_rows_reaches_the_server(settings, caplog, tmp_path):
    caplog.set_level(logging.DEBUG)
    nodes = [{"data-path": settings["data.name"]} for _ in range(2)]
    server = {**settings, "data.public-validation": "", "data.public-test": ""}
    federation, grid = start(server, nodes=nodes)
    federation.run()

    files = [p for p in federation.directory.path.rglob("*") if p.is_file()]
    assert len(files) > 8
    assert all(MARKER.encode() not in p.read_bytes() for p in files)
    assert MARKER not in caplog.text
    reply = message_handler.reply_to(grid.sent[0], next(iter(grid.contexts.values())))
    assert set(reply.content) == {ARRAYS, WIRE}


def test_a_silent_client_does_not_stop_the_round(settings, caplog):
    caplog.set_level(logging.INFO)

    def answer(message, context):
        if message.metadata.dst_node_id == 101:
            return None
        return message_handler.reply_to(message, context)

    impatient = {**settings, "strategy.round-timeout": 1.0, "num-server-rounds": 1}
    federation, _ = start(impatient, answer)
    federation.run()

    assert lines_of(federation)[1]["clients_answered"] == 2
    assert "1 clients did not answer" in caplog.text


@pytest.mark.parametrize(
    "content",
    [
        RecordDict(),
        RecordDict({"arrays": ConfigRecord({"x": 1})}),
        RecordDict({"other": ArrayRecord()}),
        error_content("no-such-code", "boo"),
        RecordDict({"error": ConfigRecord({"code": 7})}),
        RecordDict({ARRAYS: array_record({"x": np.full(3, np.nan, np.float32)})}),
    ],
)
def test_a_hostile_reply_does_not_stop_the_round(settings, content):
    def answer(message, context):
        if message.metadata.dst_node_id == 100:
            return Message(as_sent(content), reply_to=message)
        return message_handler.reply_to(message, context)

    federation, _ = start({**settings, "num-server-rounds": 1}, answer)
    federation.run()

    line = lines_of(federation)[1]
    assert (line["clients_answered"], line["clients_rejected"]) == (3, 1)


def test_a_reply_that_cannot_be_inflated_counts_as_zero(settings):
    def answer(message, context):
        if message.metadata.dst_node_id == 100:
            raise ValueError("not a record")
        return message_handler.reply_to(message, context)

    federation, _ = start({**settings, "num-server-rounds": 1}, answer)
    federation.run()

    assert lines_of(federation)[1]["clients_rejected"] == 1
    assert lines_of(federation)[1]["clients_answered"] == 3


def test_an_empty_poisson_cohort_is_a_round_of_noise(settings, monkeypatch):
    from fedllm.privacy.mechanism import SecureGenerator

    monkeypatch.setattr(
        SecureGenerator, "bernoulli", lambda self, q, size: np.zeros(size, bool)
    )
    federation, grid = start({**settings, **SECRET_COHORTS, "num-server-rounds": 1})
    before = {k: v.copy() for k, v in federation.progress.arrays.items()}
    federation.run()

    # The run is announced, and nobody is asked for an update.
    assert {message.metadata.message_type for message in grid.sent} == {"query"}
    assert all((federation.progress.arrays[k] != before[k]).all() for k in before)


def test_clients_evaluate_on_their_held_out_rows_without_dp(settings, drawings, caplog):
    told = {}

    def answer(message, context):
        reply = message_handler.reply_to(message, context)
        if message.metadata.message_type.startswith("evaluate"):
            node = message.metadata.dst_node_id
            told[node] = dict(reply.content.metric_records[METRICS])
        return reply

    with caplog.at_level(logging.INFO):
        federation, _ = start({**settings, **EVALUATE}, answer)
        federation.run()

    before, *_, line = lines_of(federation)
    losses = [m["eval-loss"] for m in told.values()]
    sizes = [m["num-examples"] for m in told.values()]
    assert before["client_loss"] is None
    assert 0 < sum(sizes) < 24
    assert line["client_loss"] == pytest.approx(np.average(losses, weights=sizes))
    assert line["client_loss_best"] == min(losses)
    assert line["client_loss_worst"] == max(losses)
    assert line["clients_evaluated"] == 3
    assert f"worst {max(losses):.3f} of 3)" in caplog.text
    assert "worst client" in (federation.directory.path / "report.html").read_text()


@pytest.mark.parametrize(
    "hostile",
    [
        {"eval-loss": float("nan"), "num-examples": 3},
        {"eval-loss": float("-inf"), "num-examples": 3},
        {"eval-loss": -5.0, "num-examples": 3},
        {"eval-loss": 1e300, "num-examples": 2**62},
        {"eval-loss": [1.0, 2.0], "num-examples": 3},
        {"num-examples": 3},
        {},
        None,
        "error",
        "silent",
    ],
)
def test_a_hostile_evaluation_takes_only_itself_away(settings, hostile):
    def answer(message, context):
        reply = message_handler.reply_to(message, context)
        if not message.metadata.message_type.startswith("evaluate"):
            return reply
        if message.metadata.dst_node_id != 100:
            return reply
        if hostile == "silent":
            return None
        content = RecordDict()
        if hostile == "error":
            content = error_content("failed", "no")
        elif hostile is not None:
            content = RecordDict({METRICS: MetricRecord(hostile)})
        forged = Message(as_sent(content), reply_to=message)
        forged.metadata.__dict__["_src_node_id"] = 101
        return forged

    changes = {"strategy.round-timeout": 2.0} if hostile == "silent" else {}
    federation, _ = start({**settings, **EVALUATE, **changes}, answer)
    federation.run()

    for line in lines_of(federation)[1:]:
        assert line["clients_evaluated"] == 2
        assert line["client_loss_best"] <= line["client_loss"]
        assert line["client_loss"] <= line["client_loss_worst"] < 100


def test_a_client_weighs_no_more_than_the_examples_it_was_asked_to_score(settings):
    def answer(message, context):
        if not message.metadata.message_type.startswith("evaluate"):
            return message_handler.reply_to(message, context)
        liar = message.metadata.dst_node_id == 100
        count, loss = (2**31, 900.0) if liar else (4, 2.0)
        metrics = MetricRecord({"num-examples": count, "eval-loss": loss})
        return Message(masked(RecordDict({METRICS: metrics})), reply_to=message)

    federation, _ = start(
        {**settings, **EVALUATE, "strategy.evaluate-examples": 4}, answer
    )
    federation.run()

    line = lines_of(federation)[1]
    assert line["client_loss"] == pytest.approx((900 + 2 + 2) / 3)
    assert (line["client_loss_best"], line["client_loss_worst"]) == (2.0, 900.0)
