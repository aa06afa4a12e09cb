"""A sealed run, whole and in one process: real clients, real trustees, the real loop."""

import json

from flwr.app import ConfigRecord

from fedllm.client import message_handler
from fedllm.server.trustees import SealedNodes
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
from tests.helpers.sealed import sealed

__all__ = ["sealed"]

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


def test_nodes_that_refuse_are_counted_by_code(sealed, caplog):
    federation = sealed()
    federation.context(3).node_config["least-trustees"] = 9

    federation.begin()

    assert "1 of 4 nodes refuse this sealed run (bad-config x1)" in caplog.text
