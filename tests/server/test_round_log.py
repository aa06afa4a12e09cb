"""Failures of a round: their cause, and nothing that is secret."""

import json
import logging
import re

import pytest
from flwr.app import Message, RecordDict

from fedllm.client import message_handler
from fedllm.errors import FederationError
from fedllm.evaluation.held_out_loss import HeldOut
from fedllm.server.round_log import RoundReport, pairs_text
from fedllm.wire.masking import masked
from tests.helpers.federations import NO_PRIVACY, lines_of, partitions, start
from tests.helpers.rows import MARKER


def test_a_run_in_which_all_clients_fail_fails_with_the_cause(settings):
    bad = {**settings, **NO_PRIVACY, "data.name": "/nowhere/rows.jsonl"}
    federation, _ = start(bad)

    with pytest.raises(FederationError, match=r"/nowhere/rows\.jsonl"):
        federation.run()


def test_under_dp_the_cause_is_a_code_and_the_text_stays_with_the_client(
    settings, caplog, tmp_path
):
    caplog.set_level(logging.INFO)
    secret = {**settings, "data.name": f"/nowhere/{MARKER}.jsonl"}
    federation, _ = start(secret)

    with pytest.raises(FederationError, match=r"no-data \(6 times\)"):
        federation.run()

    assert MARKER not in caplog.text
    assert MARKER in (tmp_path / "home/logs/client-0.log").read_text()
    assert "(code no-data); the client failed, and its own log" in caplog.text


def test_under_dp_a_malformed_reply_sends_nobody_to_the_clients_log(settings, caplog):
    caplog.set_level(logging.INFO)

    def answer(message, context):
        if message.metadata.dst_node_id == 100:
            return Message(masked(RecordDict()), reply_to=message)
        return message_handler.reply_to(message, context)

    federation, _ = start({**settings, "num-server-rounds": 1}, answer)
    federation.run()

    assert "(code malformed); the server rejected the reply" in caplog.text
    assert "client-<partition>.log" not in caplog.text


def test_a_node_of_another_version_is_named_by_a_hash_with_what_to_do(settings, caplog):
    caplog.set_level(logging.INFO)

    def answer(message, context):
        reply = message_handler.reply_to(message, context)
        if message.metadata.dst_node_id == 100:
            del reply.content["wire"]
        return reply

    federation, _ = start({**settings, "num-server-rounds": 1}, answer)
    federation.run()

    # sha256("100")
    assert "node ad573668: no usable update (code other-version)" in caplog.text
    assert "install the server's version there" in caplog.text
    assert not re.search(r"\bnode 100\b", caplog.text)
    assert lines_of(federation)[1]["clients_rejected"] == 1


def test_poisson_runs_say_nothing_of_who_or_how_many_took_part(settings, caplog):
    caplog.set_level(logging.INFO)
    coins = {
        **settings,
        "num-server-rounds": 3,
        "strategy.sampling": "poisson",
        "strategy.fraction-train": 0.5,
        "privacy.target-epsilon": 2.0,
    }
    federation, _ = start(coins, nodes=partitions(6))
    federation.run()

    for line in lines_of(federation)[1:]:
        for key in ("asked", "answered", "rejected"):
            assert line[f"clients_{key}"] is None
        assert line["megabytes_up"] is line["megabytes_down"] is None
        assert line["seconds"]["train"] is line["seconds"]["aggregate"] is None
    assert not re.search(r"client \d+ of", caplog.text)
    assert not re.search(r"round \d/3, .* \d+ s$", caplog.text, re.MULTILINE)
    assert " of 6 clients" not in caplog.text.replace("each of 6 clients", "")
    told = json.loads((federation.directory.path / "privacy.json").read_text())
    assert told["num_sampled_clients"] == 3
    assert told["epsilon"] <= 2 < told["epsilon_replace_one"]


def test_where_cohorts_are_secret_an_unreadable_reply_is_not_told(settings, caplog):
    caplog.set_level(logging.INFO)
    coins = {**settings, "num-server-rounds": 1, "strategy.sampling": "poisson"}
    federation, grid = start(coins)

    def pull_messages(message_ids):
        raise ValueError("hostile bytes")

    grid.pull_messages = pull_messages
    federation.run()

    assert "could not be read" not in caplog.text
    assert "no usable update (code" not in caplog.text


def test_where_cohorts_are_secret_a_silent_client_is_not_told(settings, caplog):
    caplog.set_level(logging.INFO)
    coins = {**settings, "num-server-rounds": 1, "strategy.sampling": "poisson"}
    # Every coin is heads, so that clients were asked.
    coins |= {"strategy.fraction-train": 1.0, "strategy.round-timeout": 0.2}
    federation, grid = start(coins, answer=lambda message, context: None)
    federation.run()

    kinds = [message.metadata.message_type for message in grid.sent]
    assert kinds.count("train") == 3
    assert "did not answer" not in caplog.text


def test_a_round_on_pairs_says_which_share_it_gets_right():
    score = HeldOut(0.6, 8, 90, preferred=0.75, likelier=0.5)

    later = pairs_text(RoundReport(3, loss=0.6, pairs=score))
    base = pairs_text(RoundReport(0, loss=0.69, pairs=score))

    assert "75% of pairs preferred as chosen" in later
    assert "in 50% the chosen answer is the likelier one" in later
    # The base rewards nothing: that it prefers none says nothing of it.
    assert "preferred" not in base and "50%" in base
    assert pairs_text(RoundReport(3, loss=2.0)) == ""
