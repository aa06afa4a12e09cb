"""A client spends no more than its records' budget."""

import json
from pathlib import Path
from typing import Any

import pytest

from fedllm.client import cache
from fedllm.client.message_handler import reply_to
from fedllm.privacy.accounting import record_epsilon
from fedllm.wire.masking import WIRE
from fedllm.wire.messages import ARRAYS
from tests.helpers.client_replies import (
    JOINT,
    NODE,
    NUMBERS,
    RECORD,
    code_of,
    epsilon_of,
    text_of,
)
from tests.helpers.flower_messages import context, train_instruction


def test_rounds_that_the_target_is_calibrated_for_are_all_allowed_and_no_more(answer):
    spent = [epsilon_of(answer(RECORD, server_round=r)) for r in range(1, 6)]

    assert 7.9 < spent[-1] <= 8.0
    assert code_of(answer(RECORD, server_round=6)) == "budget-spent"


def test_a_simulation_begins_anew_in_another_run_and_a_real_node_does_not(
    answer, run_config, arrays, home, data_file
):
    def ask(node: dict[str, Any], run_id: int) -> float:
        where = context({**run_config, **RECORD}, node)
        where.run_id = run_id
        return epsilon_of(reply_to(train_instruction(arrays), where))

    real = {"data-path": str(data_file)}

    assert ask(NODE, 1) == ask(NODE, 2)
    assert (home / "ledgers/simulated/1/0/ledger.json").exists()
    once = ask(real, 1)
    assert ask(real, 2) > 1.2 * once
    assert [p.name for p in (home / "ledgers").glob("*/key")] == ["key"]


def test_a_nodes_limit_makes_more_noise_and_no_run_config_passes_it(answer, limits):
    first = [epsilon_of(answer(RECORD, {**NODE, **limits})) for _ in range(5)]

    assert 3.9 < first[-1] <= 4.0
    for promise in (
        {"privacy.target-epsilon": 100.0},
        {"privacy.target-epsilon": 0.0, "privacy.noise-multiplier": 0.5},
        {"privacy.max-epsilon": 1000.0},
        {"num-server-rounds": 1},
    ):
        reply = answer({**RECORD, **promise}, {**NODE, **limits})
        assert code_of(reply) == "budget-spent"
        assert text_of(reply) == ""


def test_nothing_is_trained_once_the_budget_is_spent(answer, limits, monkeypatch):
    from fedllm.training import dp_sgd

    spend = {**RECORD, "privacy.target-epsilon": 0.0, "privacy.noise-multiplier": 0.5}
    node = {**NODE, **limits, "max-epsilon": 0.1}

    def train(*args: Any) -> None:
        raise AssertionError("trained")

    monkeypatch.setattr(dp_sgd, "train_privately", train)

    assert code_of(answer(spend, node)) == "budget-spent"


def test_the_adapter_leaves_only_after_the_ledger_is_on_disk(answer, monkeypatch):
    from fedllm.privacy.sealed_folder import SealedFolder

    answer(RECORD)
    monkeypatch.setattr(
        SealedFolder,
        "write",
        lambda self, content: (_ for _ in ()).throw(OSError(28, "disk full")),
    )

    assert code_of(answer(RECORD, server_round=2)) == "failed"


def test_a_ledger_that_was_edited_stops_the_client(answer, home):
    answer(RECORD)
    path = home / "ledgers/simulated/1/0/ledger.json"
    text = path.read_text()
    path.write_text(text.replace('"steps": 1', '"steps": 2'))
    assert path.read_text() != text

    reply = answer(RECORD)

    assert code_of(reply) == "failed"
    assert "cannot be trusted" in (home / "logs/client-0.log").read_text()


def test_fewer_records_than_a_batch_are_refused(answer, home):
    reply = answer({**RECORD, "train.gradient-accumulation": 3})

    assert code_of(reply) == "bad-config"
    log = (home / "logs/client-0.log").read_text()
    assert "draws batches of 6 records" in log and "client has 5" in log


def test_new_rows_begin_no_new_budget_and_rows_that_return_cost_the_same(
    answer, tmp_path
):
    """Else the epsilon, or the refusal, would tell which rows were there before."""
    path = tmp_path / "own.jsonl"
    noise = {"privacy.target-epsilon": 0.0, "privacy.noise-multiplier": 2.0}

    def ask(word: str) -> float:
        rows = [{"instruction": f"{word} {i}", "response": "a"} for i in range(4)]
        path.write_text("\n".join(json.dumps(row) for row in rows))
        cache._resident.clear()
        return epsilon_of(answer({**RECORD, **noise}, {"data-path": str(path)}))

    spent = [ask(word) for word in ("old", "new", "old")]
    (tmp_path / "home/ledgers/own").rename(tmp_path / "away")

    assert [ask("other") for _ in range(3)] == spent
    assert spent == sorted(spent) and spent[0] < spent[2]


def releases_of(home: Path) -> Any:
    path = home / "ledgers/simulated/1/0/ledger.json"
    return json.loads(path.read_text())["content"]["releases"]


def test_a_joint_step_is_on_the_nodes_ledger_before_a_coin_is_tossed(
    answer, home, monkeypatch
):
    from fedllm.training import joint_step

    seen = []

    def tossed(*args: Any) -> list[Any]:
        seen.append(releases_of(home))
        raise MemoryError

    monkeypatch.setattr(joint_step, "drawn", tossed)

    assert code_of(answer(JOINT, **NUMBERS)) == "out-of-memory"
    assert seen == [[[2.0, 0.2, 1]]]
    # What fails after its coins stays paid for.
    assert releases_of(home) == [[2.0, 0.2, 1]]


def test_joint_steps_cost_what_the_servers_numbers_say_and_stop_at_the_limit(
    answer, home, limits
):
    node = {**NODE, **limits, "privacy-noise": "joint", "max-epsilon": 2.0}
    event = (2.0, 0.2)
    steps = 1
    while record_epsilon([(*event, steps + 1)], 1e-5) <= 2.0:
        steps += 1

    for server_round in range(1, steps + 1):
        reply = answer(JOINT, node, server_round=server_round, **NUMBERS)
        assert set(reply.content) == {ARRAYS, WIRE}
    assert code_of(answer(JOINT, node, **NUMBERS)) == "budget-spent"
    ledger = json.loads((home / "ledgers/own/ledger.json").read_text())
    assert ledger["content"]["releases"] == [[*event, steps]]


def test_a_server_that_names_other_numbers_later_in_a_run_gets_nothing(answer, home):
    answer(JOINT, **NUMBERS)

    for other in ({"noise_multiplier": 3.0}, {"total_rows": 1000}):
        assert code_of(answer(JOINT, **{**NUMBERS, **other})) == "bad-config"
    assert releases_of(home) == [[2.0, 0.2, 1]]
    assert "other numbers" in (home / "logs/client-0.log").read_text()


@pytest.mark.parametrize(
    "numbers",
    [
        {"total_rows": 10},
        {"noise_multiplier": 2.0},
        {"noise_multiplier": 0.0, "total_rows": 10},
        {"noise_multiplier": float("nan"), "total_rows": 10},
        {"noise_multiplier": float("inf"), "total_rows": 10},
        {"noise_multiplier": "2.0", "total_rows": 10},
        {"noise_multiplier": 2.0, "total_rows": 1},
        {"noise_multiplier": 2.0, "total_rows": 10.0},
        {"noise_multiplier": 1e12, "total_rows": 10},
    ],
)
def test_numbers_of_a_server_that_are_none_are_refused(answer, numbers):
    assert code_of(answer(JOINT, **numbers)) in ("bad-config", "failed")


def test_less_noise_than_the_run_config_promises_is_refused(answer):
    promise = {"privacy.target-epsilon": 0.0, "privacy.noise-multiplier": 2.5}

    assert code_of(answer({**JOINT, **promise}, **NUMBERS)) == "bad-config"


def test_a_real_client_whose_ledger_begins_is_told_so_once(answer, home, data_file):
    node = {"data-path": str(data_file), "partition-id": 4}
    answer(RECORD, node)
    answer(RECORD, node, server_round=2)
    answer(RECORD)

    told = (home / "logs/client-4.log").read_text()
    assert told.count("ledgers/own: a new ledger begins, with nothing spent") == 1
    assert "a new ledger" not in (home / "logs/client-0.log").read_text()
