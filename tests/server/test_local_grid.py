"""Clients that answer in the server's process."""

import threading

import pytest
from flwr.app import Message, RecordDict

from fedllm.server.local_grid import FIRST_NODE, LocalGrid
from fedllm.server.reply_stream import ReplyStream
from tests.helpers.federations import partitions
from tests.helpers.flower_messages import instruction


def stream(client, count):
    grid = LocalGrid(client, partitions(count), {"seed": 3}, run_id=5)
    asked = [instruction(node_id=node) for node in grid.get_node_ids()]
    return ReplyStream(grid, asked, 60.0), grid


def test_clients_work_one_after_another_in_the_servers_own_thread():
    working: list[threading.Thread] = []
    seen = []

    def client(message, context):
        working.append(threading.current_thread())
        seen.append((context.node_config["partition-id"], context.run_id))
        assert context.run_config == {"seed": 3}
        return Message(RecordDict(), reply_to=message)

    replies, grid = stream(client, 3)
    senders = []
    for number, reply in enumerate(replies, start=1):
        senders.append(reply.metadata.src_node_id)
        # A client works when its reply is asked for, so one reply is in memory.
        assert len(seen) == number

    assert senders == list(grid.get_node_ids())
    assert senders[0] == FIRST_NODE
    assert seen == [(0, 5), (1, 5), (2, 5)]
    assert set(working) == {threading.main_thread()}


def test_an_interrupt_in_a_client_ends_the_round():
    def client(message, context):
        raise KeyboardInterrupt

    replies, _ = stream(client, 2)
    with pytest.raises(KeyboardInterrupt):
        list(replies)


def test_a_message_is_answered_once_and_an_unknown_one_never():
    def client(message, context):
        return Message(RecordDict(), reply_to=message)

    _, grid = stream(client, 1)
    (known,) = grid.push_messages([instruction(node_id=FIRST_NODE)])

    assert len(list(grid.pull_messages([known]))) == 1
    assert list(grid.pull_messages([known, "another"])) == []


def test_what_would_hold_all_replies_at_once_is_refused():
    _, grid = stream(lambda message, context: None, 1)

    with pytest.raises(NotImplementedError):
        grid.send_and_receive([])
