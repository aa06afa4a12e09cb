"""A run with secret coins is announced to all clients before any is tossed."""

import logging

import pytest

from fedllm.client.message_handler import reply_to
from fedllm.client.node_budget import node_ledger_folder
from fedllm.errors import FederationError
from fedllm.privacy.accounting import gaussian_epsilon
from fedllm.privacy.composition import composed_epsilon
from fedllm.privacy.node_ledger import NodeLedger
from fedllm.strategy import cohort
from tests.helpers.federations import (
    NO_PRIVACY,
    SECRET_COHORTS,
    Killed,
    federation,
    kill,
    learner,
    resumed,
    start,
)

COINS = {**SECRET_COHORTS, "privacy.max-epsilon": 10.0, "num-server-rounds": 1}


def node_of(settings: dict, **limits: object) -> dict:
    return {"data-path": settings["data.name"], **limits}


def kinds(grid) -> list[tuple[str, int]]:
    return [(m.metadata.message_type, m.metadata.dst_node_id) for m in grid.sent]


@pytest.fixture
def nobody_is_drawn(monkeypatch):
    monkeypatch.setattr(
        cohort.SecureGenerator, "bernoulli", lambda self, q, n: [False] * n
    )


def test_every_client_counts_a_run_that_draws_none_of_them(
    quick, nobody_is_drawn, tmp_path
):
    nodes = [node_of(quick, **{"max-epsilon": 10.0}) for _ in range(3)]
    run, grid = start({**quick, **COINS}, nodes=nodes)

    run.run()

    assert kinds(grid) == [("query", 100), ("query", 101), ("query", 102)]
    account = NodeLedger(node_ledger_folder(tmp_path / "home")).account()
    (event,) = account.events()
    assert event == (2.0, 0.5, 1)
    assert composed_epsilon([event], 1e-5) < gaussian_epsilon(2.0, 1, 1e-5)


def test_no_two_announcements_are_alike(quick, nobody_is_drawn):
    _, grid = ran = start({**quick, **COINS})
    ran[0].run()

    nonces = {m.content["config"]["nonce"] for m in grid.sent}
    assert len(nonces) == 3


@pytest.mark.parametrize("changes", [{}, NO_PRIVACY])
def test_where_no_coin_is_tossed_nothing_is_announced(quick, changes):
    def refuse(message, context):
        assert message.metadata.message_type == "train"
        return learner(message, context)

    run, grid = start({**quick, **changes, "num-server-rounds": 1}, refuse)
    run.run()

    assert {kind for kind, _ in kinds(grid)} == {"train"}


def test_a_run_that_every_client_refuses_ends_before_round_1(quick):
    nodes = [node_of(quick, **{"max-epsilon": 0.1}) for _ in range(3)]
    run, grid = start({**quick, **COINS}, nodes=nodes)

    with pytest.raises(FederationError, match="every client refuses.*bad-config x3"):
        run.run()
    assert {kind for kind, _ in kinds(grid)} == {"query"}


def test_clients_that_refuse_or_stay_silent_do_not_stop_the_others(
    quick, nobody_is_drawn, caplog
):
    caplog.set_level(logging.INFO)
    refusing = node_of(quick, **{"max-epsilon": 0.1})

    def answer(message, context):
        return (
            None if message.metadata.dst_node_id == 101 else reply_to(message, context)
        )

    nodes = [refusing, node_of(quick), node_of(quick)]
    run, _ = start({**quick, **COINS}, answer, nodes=nodes)
    run.run()

    assert "1 of 3 clients refuse this run: bad-config x1" in caplog.text


def test_a_resumed_run_is_announced_by_what_it_began_as(quick, nobody_is_drawn):
    given = {**quick, **COINS, "num-server-rounds": 2}
    with pytest.raises(Killed):
        federation(given, kill).run()
    asked: list[str] = []

    def note(message, context):
        asked.append(str(message.content["config"]["original-run"]))
        return reply_to(message, context)

    resumed(answer=note).run()

    assert len(asked) == 3 and all('"run_id": 7' in text for text in asked)
