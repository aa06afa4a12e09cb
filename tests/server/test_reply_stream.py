"""Lines of progress: sparing, with the time left, none of secret cohorts; and senders."""

import logging
import time

import pytest
from flwr.app import Message, RecordDict

from fedllm.server import reply_stream
from fedllm.server.reply_stream import ReplyStream
from tests.helpers.flower_messages import instruction, reply


class SlowGrid:
    """Answers one message a second, on a clock that only moves when it is slept on."""

    def __init__(self, count, monkeypatch):
        self.now, self.count = 100.0, count
        monkeypatch.setattr(reply_stream.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(reply_stream.time, "sleep", self._sleep)

    def _sleep(self, seconds):
        self.now += seconds

    def push_messages(self, messages):
        return list(range(len(messages)))

    def pull_messages(self, ids):
        ready = 100.0 + ids[0] + 1.0
        return [reply(RecordDict())] if self.now >= ready else []


def progress(count, may_count, monkeypatch, caplog, timeout=1e4):
    caplog.set_level(logging.INFO)
    waiting = ReplyStream(
        SlowGrid(count, monkeypatch), [instruction()] * count, timeout
    )
    if may_count:
        waiting.show_progress(2, 5)
    answered = len(list(waiting))
    return answered, caplog.messages


def test_the_first_and_the_last_are_said_with_the_time_left(monkeypatch, caplog):
    answered, lines = progress(4, True, monkeypatch, caplog)

    assert answered == 4
    assert lines[0] == "round 2/5: client 1 of 4 answered after 2 s, about 5 s left"
    assert lines[-1] == "round 2/5: client 4 of 4 answered after 4 s"


def test_large_cohorts_are_told_of_at_most_once_in_five_seconds(monkeypatch, caplog):
    _, lines = progress(100, True, monkeypatch, caplog)

    assert 10 <= len(lines) <= 22
    middle = lines[len(lines) // 2]
    done, left = int(middle.split()[3]), float(middle.split()[-3])
    assert left == pytest.approx(100 - done, abs=3)


def test_nobody_is_waited_for_beyond_the_time_limit(monkeypatch, caplog):
    answered, lines = progress(100, True, monkeypatch, caplog, timeout=10.5)

    assert answered == 10
    assert lines[0].endswith("answered after 2 s, about 9 s left")


def test_secret_cohorts_are_not_counted_aloud(monkeypatch, caplog):
    answered, lines = progress(4, False, monkeypatch, caplog)

    assert answered == 4
    assert lines == []


class OneGrid:
    """Has one reply to each message, or raises it."""

    def __init__(self, replies):
        self.replies = replies

    def push_messages(self, messages):
        return list(range(len(messages)))

    def pull_messages(self, ids):
        found = self.replies[ids[0]]
        if isinstance(found, BaseException):
            raise found
        return [found]


def test_an_interrupt_while_a_reply_is_fetched_ends_the_round():
    waiting = ReplyStream(OneGrid([KeyboardInterrupt()]), [instruction()], 10.0)

    with pytest.raises(KeyboardInterrupt):
        list(waiting)


class InMemoryGrid:
    """A simulation's, which answers at once; notes how many are stored."""

    def __init__(self):
        self.asked, self.stored, self.most = {}, set(), 0

    def push_messages(self, messages):
        new = range(len(self.asked), len(self.asked) + len(messages))
        self.asked |= dict(zip(new, messages, strict=True))
        self.stored |= set(new)
        self.most = max(self.most, len(self.stored))
        return list(new)

    def pull_messages(self, ids):
        (one,) = ids
        if one not in self.stored:
            return []
        self.stored.remove(one)
        return [Message(RecordDict(), reply_to=self.asked[one])]


class RealGrid(InMemoryGrid):
    """Not a simulation's."""


@pytest.mark.parametrize(("kind", "most"), [(InMemoryGrid, 64), (RealGrid, 200)])
def test_a_simulation_stores_few_messages_at_a_time(kind, most, monkeypatch):
    monkeypatch.setattr(reply_stream, "_STORED_IN_SIMULATION", 64)
    grid = kind()
    asked = [instruction(node_id=5 + i) for i in range(200)]

    came = list(ReplyStream(grid, asked, 60.0))

    assert [one.metadata.src_node_id for one in came] == [5 + i for i in range(200)]
    assert grid.most == most


def test_nodes_that_are_gone_do_not_keep_the_others_waiting(monkeypatch):
    monkeypatch.setattr(reply_stream, "_STORED_IN_SIMULATION", 2)
    grid = InMemoryGrid()
    push = grid.push_messages
    grid.push_messages = lambda messages: [
        i if grid.asked[i].metadata.dst_node_id > 8 else None for i in push(messages)
    ]

    started = time.monotonic()
    came = list(ReplyStream(grid, [instruction(node_id=5 + i) for i in range(6)], 60.0))

    assert [one.metadata.src_node_id for one in came] == [9, 10]
    assert time.monotonic() - started < 30.0


def test_the_simulation_is_known_by_flowers_own_name():
    from flwr.superlink.grid import InMemoryGrid as flowers

    assert flowers.__name__ == InMemoryGrid.__name__


def test_who_replied_is_who_was_asked_whatever_a_reply_says_of_itself():
    asked = [instruction(node_id=5), instruction(node_id=6)]
    forged = reply(RecordDict(), node_id=5)
    honest = Message(RecordDict(), reply_to=asked[0])

    came = list(ReplyStream(OneGrid([honest, forged]), asked, 1.0))

    assert [message.metadata.src_node_id for message in came] == [5, 6]


@pytest.mark.parametrize("error", [MemoryError(), ValueError(), RecursionError()])
def test_a_reply_that_cannot_be_inflated_is_an_error_of_its_node(error):
    asked = [instruction(node_id=5), instruction(node_id=6)]
    replies = [error, Message(RecordDict(), reply_to=asked[1])]

    broken, honest = ReplyStream(OneGrid(replies), asked, 1.0)

    assert broken.metadata.src_node_id == 5 and honest.has_content()
    assert type(error).__name__ in broken.error.reason


def test_a_reply_with_neither_content_nor_error_is_an_error_too():
    empty = reply(RecordDict())
    empty.__dict__["_content"] = None

    (came,) = ReplyStream(OneGrid([empty]), [instruction()], 1.0)

    assert came.has_error()


class StallingGrid(OneGrid):
    """Never comes back from fetching the first reply."""

    def pull_messages(self, ids):
        if ids[0] == 0:
            time.sleep(60)
        return super().pull_messages(ids)


def test_a_reply_that_is_never_fetched_whole_holds_up_neither_others_nor_the_round(
    monkeypatch,
):
    monkeypatch.setattr(reply_stream, "_PATIENCE", 0.2)
    asked = [instruction(node_id=5), instruction(node_id=6)]
    grid = StallingGrid([None, Message(RecordDict(), reply_to=asked[1])])
    began = time.monotonic()

    came = list(ReplyStream(grid, asked, 1.0))

    assert [message.metadata.src_node_id for message in came] == [6]
    assert time.monotonic() - began < 10
