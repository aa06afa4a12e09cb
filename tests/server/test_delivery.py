"""After the last round every client gets the released adapter, and the run ends well."""

import json
import logging
from typing import Any

import numpy as np
import pytest

from fedllm.client.delivery import deliveries, read_trained
from fedllm.client.message_handler import reply_to
from fedllm.evaluation.public_rows import PublicRows
from fedllm.wire.messages import DELIVER
from tests.helpers.federations import (
    JOINT,
    NO_PRIVACY,
    SECRET_COHORTS,
    Killed,
    federation,
    kill,
    learner,
    resumed,
    start,
)

PERSONAL = {"personal.epochs": 1.0}


def kinds(grid: Any) -> list[str]:
    return [message.metadata.message_type for message in grid.sent]


@pytest.mark.parametrize("changes", [{}, NO_PRIVACY, SECRET_COHORTS, JOINT])
def test_each_client_gets_the_adapter_after_the_last_round(changes, settings):
    settings |= {"num-server-rounds": 1, **PERSONAL, **changes}
    run, grid = start(settings)
    result = run.run()

    assert kinds(grid)[-3:] == [DELIVER] * 3 and DELIVER not in kinds(grid)[:-3]
    kept = deliveries()
    assert [one.node.partition_id for one in kept] == [0, 1, 2]
    tuned = run.progress.arrays
    for one in kept:
        shared = read_trained(one.folder / "shared")
        assert all(np.array_equal(shared[name], tuned[name]) for name in tuned)
    assert len({message.content["config"]["nonce"] for message in grid.sent}) == len(
        grid.sent
    )
    assert result == json.loads((run.directory.path / "result.json").read_text())


@pytest.mark.parametrize(
    ("losses", "best"), [([3.0, 1.0, 2.0], 1), ([1.0, 2.0, 3.0], 0)]
)
def test_the_best_round_is_delivered_and_without_one_the_last(
    losses, best, quick, monkeypatch
):
    rest = iter(losses)
    monkeypatch.setattr(PublicRows, "validation_loss", lambda *_: next(rest))

    def answer(message: Any, context: Any) -> Any:
        is_last = message.metadata.message_type == DELIVER
        return reply_to(message, context) if is_last else learner(message, context)

    changes = {"num-server-rounds": 2, "privacy.noise-probe": False, **PERSONAL}
    run, _ = start({**quick, **changes}, answer)
    run.run()

    progress = run.progress
    assert progress.best.server_round == best
    wanted = progress.best.arrays if best else progress.arrays
    assert any(np.any(wanted[name] != progress.arrays[name]) for name in wanted) == best
    shared = read_trained(deliveries()[0].folder / "shared")
    assert all(np.array_equal(shared[name], wanted[name]) for name in wanted)


def test_without_personal_training_nothing_is_delivered(quick):
    run, grid = start({**quick, "num-server-rounds": 1}, learner)
    run.run()

    assert set(kinds(grid)) == {"train"}


def delivered_with(settings: dict[str, Any], on_delivery: Any, caplog: Any) -> Any:
    """Run a federation whose clients treat the delivery in their own way."""
    caplog.set_level(logging.INFO)

    def answer(message: Any, context: Any) -> Any:
        if message.metadata.message_type == DELIVER:
            return on_delivery(message, context)
        return learner(message, context)

    changes = {"num-server-rounds": 1, "strategy.round-timeout": 1.0, **PERSONAL}
    run, _ = start({**settings, **changes}, answer)
    result = run.run()
    kept = json.loads((run.directory.path / "result.json").read_text())
    assert kept == result and result["num_rounds"] == 1
    return [r for r in caplog.records if r.name == "fedllm.server.delivery"]


def test_a_client_that_fails_or_stays_silent_costs_one_line(quick, caplog):
    def answer(message: Any, context: Any) -> Any:
        if message.metadata.dst_node_id == 100:
            context.run_config = {"no-such-key": 1}
        elif message.metadata.dst_node_id == 101:
            return None
        return reply_to(message, context)

    (line,) = delivered_with(quick, answer, caplog)

    assert line.levelno == logging.WARNING
    assert "with 1 of 3 clients" in line.getMessage()
    assert "bad-config x1, no answer x1" in line.getMessage()


def test_a_network_that_fails_at_the_end_costs_one_line(quick, caplog):
    def answer(message: Any, context: Any) -> Any:
        raise OSError("unplugged")

    (line,) = delivered_with(quick, answer, caplog)

    assert line.levelno == logging.WARNING


def test_a_network_that_is_gone_before_a_message_is_sent_costs_one_line(
    quick, caplog, monkeypatch
):
    from fedllm.server import delivery

    def gone(*args: Any) -> Any:
        raise ConnectionError("gone")

    monkeypatch.setattr(delivery, "ReplyStream", gone)
    (line,) = delivered_with(quick, reply_to, caplog)

    assert "not delivered to all clients" in line.getMessage()


def test_when_all_have_it_the_next_step_is_named(quick, caplog):
    (line,) = delivered_with(quick, reply_to, caplog)

    assert line.levelno == logging.INFO
    assert "with all 3 clients: fedllm node personal" in line.getMessage()


def test_a_resumed_run_delivers_under_the_id_that_it_began_with(quick):
    given = {**quick, **PERSONAL, "num-server-rounds": 2}
    with pytest.raises(Killed):
        federation(given, kill).run()

    def answer(message: Any, context: Any) -> Any:
        if message.metadata.message_type == DELIVER:
            return reply_to(message, context)
        return learner(message, context)

    resumed(answer=answer).run()

    assert {one.run_id for one in deliveries()} == {7}
    assert len(deliveries()) == 3
