"""A node counts what its client-level runs promise, before it trains."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from flwr.app import RecordDict

from fedllm.client import message_handler
from fedllm.client.message_handler import reply_to
from fedllm.client.node_budget import asked_of, node_ledger_folder, promise_of
from fedllm.config import flat
from fedllm.config_parsing import parse_run_config
from fedllm.node.log import append, read_lines
from fedllm.planning.noise import privacy_settings
from fedllm.privacy.accounting import gaussian_epsilon
from fedllm.privacy.composition import composed_epsilon
from fedllm.privacy.node_ledger import Account, NodeLedger
from fedllm.privacy.wording import plain
from fedllm.wire.masking import WIRE
from fedllm.wire.messages import ARRAYS, CONFIG, own_config
from fedllm.wire.resumed_run import ORIGINAL_RUN, original_run
from tests.helpers.client_replies import NODE, WITHOUT_DP, code_of, text_of
from tests.helpers.flower_messages import context, instruction, train_instruction

LIMITED = {**NODE, "max-epsilon": 8.0}
COINS = {
    "strategy.sampling": "poisson",
    "strategy.fraction-train": 0.3,
    "privacy.target-epsilon": 0.0,
    "privacy.noise-multiplier": 3.0,
    "privacy.max-epsilon": 8.0,
    "num-server-rounds": 3,
}


@pytest.fixture
def asks(run_config, arrays):
    """Ask the node for a round of a run, perhaps a resumed one."""

    def ask(
        run_id: int,
        changes: dict[str, Any] | None = None,
        node: dict[str, Any] = LIMITED,
        server_round: int = 1,
        resumed_as: int | None = None,
    ):
        settings = {**run_config, **(changes or {})}
        message = train_instruction(arrays, server_round=server_round)
        where = context(settings, node)
        where.run_id = run_id
        if resumed_as is not None:
            where.run_id = resumed_as
            where.run_config["resume.from"] = "latest"
            config = parse_run_config(settings)
            message.content.config_records[CONFIG][ORIGINAL_RUN] = original_run(
                config, run_id
            )
        return reply_to(message, where)

    return ask


@pytest.fixture
def trained(monkeypatch) -> list[bool]:
    """Whether a base model was asked for, which the training begins with."""
    asked: list[bool] = []
    real = message_handler.resident_model

    def note(config: Any, rank: int | None) -> Any:
        asked.append(True)
        return real(config, rank)

    monkeypatch.setattr(message_handler, "resident_model", note)
    return asked


def account(home: Path) -> Account:
    return NodeLedger(node_ledger_folder(home)).account()


def test_two_runs_that_together_pass_the_budget_the_second_is_refused_untrained(
    asks, home, trained
):
    assert ARRAYS in asks(1).content
    del trained[:]

    refused = asks(2, {"privacy.target-epsilon": 1.0})

    assert code_of(refused) == "budget-spent"
    assert text_of(refused) == ""
    assert trained == []
    assert (
        "the others of its lifetime come to" in (home / "logs/client-0.log").read_text()
    )
    assert ARRAYS in asks(1, server_round=2).content


def test_runs_that_fit_together_are_all_answered(asks, home):
    small = {"privacy.target-epsilon": 4.0}

    assert ARRAYS in asks(1, small).content
    assert ARRAYS in asks(2, small).content
    spent = plain(composed_epsilon(account(home).events(), 1e-5))
    assert 5.5 < float(spent) < 6.5
    assert (
        f"epsilon {spent} of 8 in period 1" in (home / "logs/client-0.log").read_text()
    )


def test_a_resumed_run_is_not_charged_twice_and_one_with_other_settings_is(asks, home):
    half = {"privacy.target-epsilon": 4.0}
    asks(1, half)
    asks(1, half, server_round=2)

    assert ARRAYS in asks(1, half, server_round=2, resumed_as=9).content
    assert len(account(home).runs) == 1
    less = {**half, "num-server-rounds": 6}
    assert ARRAYS in asks(1, less, server_round=3, resumed_as=9).content
    assert len(account(home).runs) == 2


def test_what_a_run_chose_for_itself_does_not_make_it_another_when_it_is_resumed(
    run_config,
):
    typed = parse_run_config({**run_config, "adapter.kind": "auto"})
    chosen = parse_run_config(
        {**flat(typed), "adapter.kind": "lora-core", "privacy.clipping-norm": 0.2}
    )

    assert asked_of(typed, 1, 1, 1).run == asked_of(chosen, 1, 2, 1).run
    assert asked_of(typed, 1, 1, 1).run != asked_of(typed, 2, 2, 1).run


def test_a_folder_that_is_resumed_twice_is_answered_once(asks):
    for server_round in (1, 2, 3):
        asks(1, server_round=server_round)

    assert ARRAYS in asks(1, server_round=3, resumed_as=8).content
    assert code_of(asks(1, server_round=2, resumed_as=9)) == "budget-spent"


def test_a_round_beyond_the_plan_is_refused(asks):
    assert code_of(asks(1, server_round=6)) == "budget-spent"


def test_an_announced_run_is_counted_as_sampled_and_only_a_secret_cohort_is_announced(
    run_config, home, trained
):
    def announced(changes: dict[str, Any]):
        content = RecordDict({CONFIG: own_config({})})
        where = context({**run_config, **changes}, {**NODE, "max-epsilon": 8.0})
        return reply_to(instruction(content, "query"), where)

    # What an empty reply holds too, so that no node can foresee it.
    assert list(announced(COINS).content) == [WIRE]
    assert account(home).events() == [(3.0, 0.3, 3)]
    assert code_of(announced({})) == "bad-config"
    assert code_of(announced({**COINS, "privacy.max-epsilon": 9.0})) == "bad-config"
    assert len(account(home).runs) == 1
    assert trained == []


KILLED = """
import json, os, signal, sys
from fedllm.client import message_handler
from tests.helpers.flower_messages import context, train_instruction
def die(config, rank):
    os.kill(os.getpid(), signal.SIGKILL)
message_handler.resident_model = die
settings, node = json.loads(sys.argv[1])
message_handler.reply_to(train_instruction({}), context(settings, node))
"""


def test_a_client_killed_between_ledger_and_reply_has_paid(asks, run_config, home):
    given = json.dumps([run_config, LIMITED])
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, given], env=dict(os.environ), timeout=60
    )
    assert killed.returncode == -9

    assert code_of(asks(2)) == "budget-spent"
    # Of the run that was cut off the cost is the same, however often it asks.
    assert ARRAYS in asks(1).content
    assert len(account(home).runs) == 1


def test_nothing_is_trained_that_the_ledger_does_not_hold(asks, home, trained):
    asks(1)
    del trained[:]
    (home / "ledgers/node/ledger.json").unlink()

    assert code_of(asks(1, server_round=2)) == "failed"
    assert trained == []
    assert "cannot be trusted" in (home / "logs/client-0.log").read_text()


def test_a_simulated_client_keeps_no_ledger(asks, home):
    for run_id in (1, 2):
        assert ARRAYS in asks(run_id, node=NODE).content
    assert not (home / "ledgers").exists()


def test_a_node_whose_ledger_begins_is_told_so_once(asks, home):
    small = {"privacy.target-epsilon": 4.0}
    asks(1, small)
    asks(2, small)

    told = (home / "logs/client-0.log").read_text()
    assert told.count("ledgers/node: a new ledger begins, with nothing spent") == 1


def test_a_real_node_without_a_limit_counts(asks, home, data_file):
    node = {"data-path": str(data_file)}

    for run_id in (1, 2):
        assert ARRAYS in asks(run_id, node=node).content
    assert len(account(home).runs) == 2
    assert code_of(asks(3, node={**node, "max-epsilon": 8.0})) == "budget-spent"


def test_without_privacy_and_at_record_level_this_ledger_counts_nothing(
    asks, home, data_file
):
    assert ARRAYS in asks(1, WITHOUT_DP, {"data-path": str(data_file)}).content

    assert not (home / "ledgers/node").exists()
    assert code_of(asks(2, WITHOUT_DP)) == "bad-config"


def test_what_is_charged_is_a_line_of_a_log_that_the_node_keeps(asks, home):
    append("asked", run_id=1)

    asks(1)
    asks(1, server_round=2)

    lines = list(read_lines(home / "node/node.log"))
    assert [line["event"] for line in lines] == ["asked", "spent"]
    assert 7.9 < lines[1]["epsilon"] <= 8.0


@pytest.mark.parametrize("clients", [3, 200_000])
def test_the_noise_that_is_counted_is_what_the_server_adds(clients):
    config = parse_run_config({"strategy.num-clients": clients})
    server = privacy_settings(config, clients, 1000)

    promised = promise_of(config)

    assert promised.noise_multiplier == server.noise_multiplier
    assert promised.delta == server.delta
    assert promised.rounds == server.planned_rounds


def test_where_the_number_of_clients_is_open_the_least_noise_is_counted():
    config = parse_run_config({})

    promised = promise_of(config)

    assert promised.delta == 1e-5
    for clients in (2, 1_000_000):
        settings = privacy_settings(config, clients, 1000)
        assert promised.noise_multiplier <= settings.noise_multiplier


def test_a_run_that_stops_at_its_own_limit_is_charged_up_to_it():
    keys = {"privacy.target-epsilon": 0.0, "privacy.noise-multiplier": 1.0}
    config = parse_run_config({**keys, "privacy.max-epsilon": 8.0})

    promised = promise_of(config)

    assert 0 < promised.rounds < 5
    assert gaussian_epsilon(1.0, promised.rounds, 1e-5) <= 8.0


def test_secret_coins_are_counted_with_their_probability():
    promised = promise_of(parse_run_config(COINS))

    assert promised.sampling == "poisson"
    assert promised.sampling_probability == 0.3
    assert promise_of(parse_run_config({})).sampling_probability == 1.0
