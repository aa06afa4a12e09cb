"""The rows that clients declare before round 1."""

import logging

import pytest
from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict

from fedllm.config_parsing import parse_run_config
from fedllm.errors import FederationError
from fedllm.server.declared_rows import ask_declared_rows
from fedllm.wire.messages import DECLARED_ROWS, METRICS, error_content
from tests.helpers.in_process_grid import InProcessGrid

CONFIG = parse_run_config(
    {
        "privacy.unit": "record",
        "privacy.noise": "joint",
        "train.local-steps": 1,
        "strategy.round-timeout": 0.2,
    }
)


def ask(*contents, least_clients=2):
    """Ask clients whose replies are given; None stays silent."""
    replies = dict(enumerate(contents, start=100))

    def client(message, context):
        content = replies[message.metadata.dst_node_id]
        return None if content is None else Message(content, reply_to=message)

    nodes = [{"partition-id": i} for i in range(len(contents))]
    grid = InProcessGrid(nodes, {}, client)
    found = ask_declared_rows(grid, CONFIG, list(replies), least_clients)
    return found, grid


def rows(count):
    return RecordDict({METRICS: MetricRecord({DECLARED_ROWS: count})})


def test_every_client_is_asked_once_and_its_number_is_taken():
    found, grid = ask(rows(5), rows(70), rows(2))

    assert found == {100: 5, 101: 70, 102: 2}
    assert [m.metadata.message_type for m in grid.sent] == ["query"] * 3
    nonces = {m.content.config_records["config"]["nonce"] for m in grid.sent}
    assert len(nonces) == 3


@pytest.mark.parametrize(
    "content",
    [
        None,
        RecordDict(),
        rows(0),
        rows(-4),
        rows(2**40),
        rows(5.0),
        RecordDict({METRICS: ConfigRecord({DECLARED_ROWS: 5})}),
        error_content("bad-config", None),
    ],
    ids=["silence", "nothing", "0", "-4", "2^40", "5.0", "no metric", "an error"],
)
def test_a_client_that_declares_nothing_takes_no_part_and_the_others_do(
    content, caplog
):
    with caplog.at_level(logging.WARNING):
        found, _ = ask(rows(5), content, rows(2))

    assert found == {100: 5, 102: 2}
    assert "node 101: takes no part" in caplog.text


def test_too_few_that_declare_are_one_clear_line():
    with pytest.raises(
        FederationError, match="1 of 2 did: set declared-rows"
    ) as caught:
        ask(rows(5), None)

    assert "\n" not in str(caught.value)
