"""A sealed run, whole and in one process: real clients, real trustees, the real loop."""

import json
import logging
import threading

import numpy as np
import pytest
from flwr.app import ConfigRecord, Message

from fedllm.client import message_handler
from fedllm.errors import FederationError
from fedllm.server.trustees import MOST_MISSES, SealedNodes
from fedllm.wire.messages import read_reply
from fedllm.wire.sealed_messages import HELLO, TALLY
from tests.helpers.federations import (
    JOINT,
    cut_in_round,
    lines_of,
    read,
    resumed,
    start,
)
from tests.helpers.flower_messages import RUN_ID
from tests.helpers.sealed import SIZE, records, sealed, silent

__all__ = ["records", "sealed", "silent"]

SEALED = {
    "privacy.trust": "trustees",
    "privacy.trustees": "a,b,c",
    "privacy.colluding-trustees": 1,
}


def test_a_sealed_run_leaves_a_whole_run_folder(settings):
    federation, grid = start({**settings, **SEALED})

    federation.run()

    folder = federation.directory.path
    privacy = json.loads((folder / "privacy.json").read_text())
    kinds = [message.metadata.message_type for message in grid.sent]
    assert kinds == [HELLO] * 3 + (["train"] * 3 + [TALLY] * 3) * 2
    assert (privacy["trustees"], privacy["colluding"]) == (3, 1)
    assert 7.9 < privacy["epsilon"] <= 8.0
    assert 6.0 < privacy["epsilon_adapters"] < 6.6
    assert privacy["noise_probe"] is not None
    assert privacy["statement"] in (folder / "README.md").read_text()
    assert [line["clients_rejected"] for line in lines_of(federation)] == [0, 0, 0]
    assert (folder / "peft_final").is_dir()


def test_a_sealed_run_that_was_cut_off_goes_on_with_the_next_slot(quick):
    cut = cut_in_round({**quick, **SEALED}, 2, answer=message_handler.reply_to)
    # The slot was spent when it was asked for, by clients that have answered it too.
    assert read(cut, "privacy.json")["releases"] == [1, 2]

    run = resumed(answer=message_handler.reply_to)
    run.run()

    privacy, lines = read(run, "privacy.json"), lines_of(run)
    assert privacy["releases"] == [1, 2, 3]
    assert 7.9 < privacy["epsilon"] <= 8.0
    assert [line["server_round"] for line in lines] == [0, 1, 3]
    assert [line["clients_rejected"] for line in lines] == [0, 0, 0]


def test_a_sealed_run_of_records_opens_every_step_and_has_both_epsilons(settings):
    federation, grid = start({**settings, **JOINT, **SEALED})

    federation.run()

    folder = federation.directory.path
    privacy = json.loads((folder / "privacy.json").read_text())
    kinds = [message.metadata.message_type for message in grid.sent]
    assert kinds == [HELLO] * 3 + (["train"] * 3 + [TALLY] * 3) * 2
    assert (privacy["trustees"], privacy["colluding"]) == (3, 1)
    assert privacy["declared_rows"] == [8, 8, 8]
    assert privacy["sampling_probability"] == 6 / 24
    assert privacy["epsilon_adapters"] < privacy["epsilon"]
    assert "is trusted" not in privacy["statement"]
    assert (
        "at most 1 of the 3 trustees, and receives what this run released in 2 steps"
        in (privacy["statement"])
    )
    assert privacy["statement"] in (folder / "README.md").read_text()
    assert [line["clients_rejected"] for line in lines_of(federation)] == [0, 0, 0]


def test_a_sealed_run_of_records_that_was_cut_off_goes_on_with_the_next_step(quick):
    cut = cut_in_round({**quick, **JOINT, **SEALED}, 2, answer=message_handler.reply_to)
    assert read(cut, "privacy.json")["releases"] == [1, 2]

    run = resumed(answer=message_handler.reply_to)
    run.run()

    privacy, lines = read(run, "privacy.json"), lines_of(run)
    assert privacy["releases"] == [1, 2, 3]
    assert privacy["declared_rows"] == [8, 8, 8]
    assert [line["clients_rejected"] for line in lines] == [0, 0, 0]


def test_a_run_meets_its_trustees_in_the_order_of_its_config(sealed, caplog):
    federation = sealed(**{"privacy.trustees": "c,a,b"})

    roster = federation.begin().roster

    assert [c.name for _, c in roster.present] == ["c", "a", "b"]
    assert roster.least == 3


def test_a_resumed_run_has_no_more_trustees_than_its_ledger_counts_on(sealed):
    federation = sealed(**{"privacy.least-trustees": 2})

    nodes = SealedNodes(
        federation.grid, federation.config, RUN_ID, ConfigRecord(), most=2
    )
    roster = nodes.meet().roster

    assert [c.name for _, c in roster.present] == ["a", "b"]


def test_a_simulation_that_ends_leaves_no_keys_and_one_that_is_cut_off_keeps_them(
    quick,
):
    cut = cut_in_round({**quick, **SEALED}, 2, answer=message_handler.reply_to)
    home = cut.directory.path.parent.parent
    kept = home / "simulated" / "7"
    assert (kept / "a.key").exists() and (kept / "slots" / "ledger.json").exists()

    # Its trustees' keys and slots are those of before.
    resumed(answer=message_handler.reply_to).run()

    assert not kept.exists()


def without_data(federation, partition):
    """Make a trustee of a federation one that has no data, and no pins."""
    node = federation.context(partition).node_config
    for key in ("data-path", "partition-id", "trusted-trustees", "declared-rows"):
        node.pop(key, None)
    return node


def test_a_trustee_without_data_opens_rounds_and_is_no_client(sealed, silent):
    federation = sealed()
    without_data(federation, 0)
    federation.updates = dict.fromkeys(range(4), 0.02)

    strategy = federation.begin()

    assert federation.population == [101, 102, 103]
    assert [c.name for _, c in strategy.roster.present] == ["a", "b", "c"]
    assert strategy.ledger.settings.population_size == 3
    # The mean is over three clients, not four.
    assert federation.round() == pytest.approx(np.full(SIZE, 0.02), abs=5e-6)
    assert sorted(federation.trained) == [1, 2, 3]
    asked = [m.metadata.dst_node_id for m in federation.grid.sent]
    assert asked.count(100) == 2  # hello and tally
    assert federation.sealed.greet() == {101, 102, 103}


def test_a_trustee_without_data_declares_no_rows(records, silent):
    federation = records()
    without_data(federation, 0)
    federation.updates = {1: [0.01]}

    strategy = federation.begin()

    assert strategy.ledger.settings.declared_rows == (8, 8, 8)
    assert federation.round() == pytest.approx(np.full(SIZE, -0.01 / 4), abs=5e-6)


def test_a_trustee_without_data_never_trains(sealed):
    federation = sealed()
    federation.begin()
    without_data(federation, 0)

    federation.round()

    assert [(node, code) for node, code, _ in federation.strategy.round.rejected] == [
        (100, "bad-config")
    ]
    assert sorted(federation.trained) == [1, 2, 3]


def test_too_few_nodes_with_data_begin_no_run(sealed):
    federation = sealed(clients=3, **{"strategy.num-clients": 3})
    without_data(federation, 0)

    with pytest.raises(FederationError, match="2 nodes with data are connected, and 1"):
        federation.begin()


def failing(federation, number, misses):
    """Let a trustee fail to open its first slots."""
    left = [misses]

    def answer(message, context):
        is_its = context.node_config["partition-id"] == number
        if message.metadata.message_type == TALLY and is_its and left[0]:
            left[0] -= 1
            return None
        return message_handler.reply_to(message, context)

    federation.answer = answer


def test_a_trustee_that_missed_a_round_is_back_at_the_next(sealed, silent, caplog):
    caplog.set_level(logging.INFO)
    federation = sealed()
    federation.updates = dict.fromkeys(range(4), 0.02)
    federation.begin()
    failing(federation, 2, 1)

    assert federation.round(1) is None
    federation.sealed.greet()
    moved = federation.round(2)

    assert moved == pytest.approx(np.full(SIZE, 0.02), abs=5e-6)
    assert [c.name for _, c in federation.strategy.roster.present] == ["a", "b", "c"]
    assert "trustee c is back" in caplog.text


def test_a_trustee_that_came_back_opens_no_slot_from_before(sealed):
    federation = sealed()
    federation.begin()
    failing(federation, 2, 1)
    federation.round(1)
    missed = next(
        message
        for message in federation.grid.sent
        if message.metadata.message_type == TALLY
        and message.metadata.dst_node_id == 102
    )
    federation.sealed.greet()
    assert federation.round(2) is not None

    late = Message(missed.content, dst_node_id=102, message_type=TALLY)
    reply = message_handler.reply_to(late, federation.context(2))

    assert read_reply(reply, {}).code == "budget-spent"


def test_a_trustee_that_does_not_answer_stays_away(sealed, silent):
    federation = sealed(**{"privacy.least-trustees": 2})
    federation.updates = dict.fromkeys(range(4), 0.02)
    federation.begin()
    federation.answer = lambda message, context: (
        None
        if context.node_config["partition-id"] == 2
        else message_handler.reply_to(message, context)
    )
    assert federation.round(1) is None

    federation.sealed.greet()

    assert [c.name for _, c in federation.strategy.roster.present] == ["a", "b"]
    assert federation.round(2) is not None


def test_a_trustee_that_spoils_rounds_again_and_again_is_out(sealed):
    federation = sealed(**{"privacy.least-trustees": 2, "num-server-rounds": 9})
    federation.begin()
    failing(federation, 2, 99)

    lost = []
    for server_round in range(1, 7):
        federation.sealed.greet()
        lost.append(federation.round(server_round) is None)

    assert lost == [True] * MOST_MISSES + [False] * 3


def test_a_trustee_under_a_new_node_id_takes_its_place(sealed, silent):
    # A SuperNode that starts anew without a key of its own has another id.
    federation = sealed()
    federation.updates = dict.fromkeys(range(4), 0.02)
    federation.begin()
    federation.grid.contexts[300] = federation.grid.contexts.pop(102)
    federation.grid.contexts[300].node_id = 300

    connected = federation.sealed.greet()

    assert 300 in connected and 102 not in connected
    assert [node for node, _ in federation.strategy.roster.present] == [100, 101, 300]
    moved = federation.round()
    assert moved == pytest.approx(np.full(SIZE, 0.02 * 3 / 4), abs=5e-6)


def test_no_more_trustees_open_a_round_than_the_ledger_counts_on(sealed):
    # With more of them each adds less noise, and whoever sees adapters was promised more.
    federation = sealed(**{"privacy.least-trustees": 2})
    third = federation.grid.contexts.pop(102)
    federation.begin()
    federation.grid.contexts[102] = third

    federation.sealed.greet()

    assert [c.name for _, c in federation.strategy.roster.present] == ["a", "b"]


def test_a_run_waits_for_trustees_that_connect_late(sealed):
    federation = sealed(**{"strategy.wait-for-clients": 20.0})
    late = federation.grid.contexts.pop(102)
    nodes = SealedNodes(federation.grid, federation.config, RUN_ID, ConfigRecord())
    nodes.waits = True
    timer = threading.Timer(
        0.3, lambda: federation.grid.contexts.__setitem__(102, late)
    )
    timer.start()

    roster = nodes.meet().roster

    assert [c.name for _, c in roster.present] == ["a", "b", "c"]


def test_nodes_that_refuse_are_counted_by_code(sealed, caplog):
    federation = sealed()
    federation.context(3).node_config["least-trustees"] = 9

    federation.begin()

    assert "1 of 4 nodes refuse this sealed run (bad-config x1)" in caplog.text
