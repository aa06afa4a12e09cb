"""Replies that come after their round: in which release they count, and how often."""

from typing import Any

import numpy as np
import pytest
from flwr.app import Message

from fedllm.config import flat
from fedllm.config_parsing import parse_run_config
from fedllm.server import late_replies, reply_stream
from fedllm.server.late_replies import LateReplies
from fedllm.server.local_grid import LocalGrid
from fedllm.server.reply_stream import Waiting
from fedllm.server.startup import set_up
from fedllm.strategy.fedavg import AdapterFedAvg
from tests.helpers.federations import (
    NO_PRIVACY,
    learner,
    lines_of,
    partitions,
    read,
)
from tests.helpers.flower_messages import RUN_ID, instruction
from tests.helpers.strategies import private, public

TIMEOUT = 20.0
NEXT = {"strategy.late-replies": "next-round", "strategy.round-timeout": TIMEOUT}


class Clock:
    """A clock that only moves when it is slept on."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


class SlowGrid(LocalGrid):
    """Clients 100, 101, ... whose replies are there after so many seconds; None: never."""

    def __init__(self, run_config: Any, clock: Clock, seconds: list[Any]) -> None:
        super().__init__(learner, partitions(len(seconds)), run_config, RUN_ID)
        self.clock, self.seconds, self.ready = clock, seconds, dict[str, float]()
        self.asked: list[tuple[int, int]] = []

    def push_messages(self, messages: Any) -> list[str]:
        pushed = list(messages)
        ids = super().push_messages(pushed)
        for message_id, message in zip(ids, pushed, strict=True):
            node = message.metadata.dst_node_id
            seconds = self.seconds[node - 100]
            if seconds is not None:
                self.ready[message_id] = self.clock.now + seconds
            self.asked.append((int(message.metadata.group_id), node))
        return ids

    def pull_messages(self, message_ids: Any) -> list[Message]:
        (one,) = message_ids
        if self.ready.get(one, np.inf) > self.clock.now:
            return []
        return super().pull_messages([one])


@pytest.fixture
def trained(quick, monkeypatch):
    """Run a federation of clients that take so long; return it, and who is in which release."""

    def train(seconds: list[Any], **more: Any) -> Any:
        clock, releases = Clock(), []
        for module in (reply_stream, late_replies):
            monkeypatch.setattr(module, "time", clock)
        given = {**flat(parse_run_config({})), **quick, **NEXT, **more}
        grid = SlowGrid(given, clock, seconds)
        run = set_up(parse_run_config(given), grid, RUN_ID)
        real = AdapterFedAvg._read

        def note(self: Any, message: Message) -> Any:
            sent_in = int(message.metadata.group_id)
            entry = (self._server_round, message.metadata.src_node_id, sent_in)
            releases.append(entry)
            return real(self, message)

        monkeypatch.setattr(AdapterFedAvg, "_read", note)
        run.run()
        return run, releases

    return train


def test_without_dp_a_late_reply_counts_in_the_round_that_is_open(trained):
    run, releases = trained([6, 6, 25], **NO_PRIVACY)

    assert [node for r, node, _ in releases if r == 1] == [100, 101]
    assert sorted(x for x in releases if x[0] == 2) == [
        (2, 100, 2),
        (2, 101, 2),
        (2, 102, 1),
    ]
    # Not asked while its reply might come; asked again once it had.
    assert [r for r, node in run.grid.asked if node == 102] == [1, 3]
    lines = lines_of(run)[1:]
    assert [line["clients_late"] for line in lines] == [0, 1, 0]
    assert [line["clients_asked"] for line in lines] == [3, 2, 3]
    # The last round's late one is dropped.
    assert [node for r, node, _ in releases if r == 3] == [100, 101]


@pytest.mark.parametrize(("seconds", "enough"), [([6, 6, 25], 0), ([2, 3, 7], 2)])
def test_dropped_is_what_a_late_reply_is_by_default(trained, seconds, enough):
    """Also where rounds close early, and it comes within the time limit of its own."""
    changes = {"strategy.late-replies": "drop", "strategy.min-replies": enough}
    run, releases = trained(seconds, **NO_PRIVACY, **changes)

    assert {node for _, node, _ in releases} == {100, 101}
    assert [r for r, node in run.grid.asked if node == 102] == [1, 2, 3]


@pytest.mark.parametrize("seconds", [6, 19, 25, 39, 41, None])
def test_under_dp_one_client_decides_about_no_other_ones_reply(trained, seconds):
    """Whether it is quick, late, too late or absent, all others are in the same releases."""
    _, releases = trained([6, 27, 33, seconds])

    others = sorted(entry for entry in releases if entry[1] != 103)
    assert others == [
        (1, 100, 1),
        (2, 100, 2),
        (2, 101, 1),
        (2, 102, 1),
        (3, 100, 3),
    ]
    per_release = [(r, node) for r, node, _ in releases]
    assert len(set(per_release)) == len(per_release)


def test_under_dp_a_run_with_late_replies_costs_what_it_costs_without(trained):
    late, _ = trained([6, 27, 33])
    told = read(late, "privacy.json")

    assert (told["num_rounds"], told["num_sampled_clients"]) == (3, 3)
    assert lines_of(late)[-1]["epsilon"] == pytest.approx(8.0, rel=0.01)


def test_a_round_that_asks_nobody_waits_for_those_who_are_late(trained):
    _, releases = trained([25, 25, 30], **NO_PRIVACY)

    assert sorted(releases) == [(2, 100, 1), (2, 101, 1), (2, 102, 1)]


def test_enough_replies_close_a_round_without_dp(trained):
    run, releases = trained([2, 3, 25], **NO_PRIVACY, **{"strategy.min-replies": 2})

    assert [(r, node) for r, node, _ in releases] == [
        (r, node) for r in (1, 2, 3) for node in (100, 101)
    ]
    assert run.grid.clock.now < 100 + 3 * 6
    # Round 3 is over before its reply is there.
    assert [r for r, node in run.grid.asked if node == 102] == [1]


def late_ones(config: Any, sent_at: float, node: int = 3) -> LateReplies:
    late = LateReplies(config)
    late._waiting = {"m": Waiting(instruction(node_id=node), sent_at)}
    return late


def test_under_dp_nothing_late_counts_once_a_node_took_anothers_place(monkeypatch):
    """The new node may be the one that still owes a reply, and would count twice."""
    clock = Clock()
    monkeypatch.setattr(late_replies, "time", clock)
    for config, kept in ((private(**NEXT), 0), (public(**NEXT), 1)):
        late = late_ones(config, clock.now)
        late.begin_round([1, 2, 3], [1, 9, 3])
        assert len(late.messages) == kept


def test_a_reply_that_can_no_longer_count_frees_its_client(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(late_replies, "time", clock)
    for age, kept in ((2 * TIMEOUT - 1, 1), (2 * TIMEOUT + 1, 0)):
        late = late_ones(private(**NEXT), clock.now - age)
        late.begin_round([1, 2, 3], [1, 2, 3])
        assert len(late.messages) == kept
    gone = late_ones(public(**NEXT), clock.now, node=7)
    gone.begin_round([1, 7], [1])
    assert not gone.messages
