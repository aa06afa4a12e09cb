"""A run on a machine that its owner limits: the same step in smaller parts, fewer steps, or none."""

from typing import Any

import numpy as np
import pytest

from fedllm.client import message_handler, record_budget
from fedllm.client.machine_limits import fitted_to_machine, micro_batch_line
from fedllm.config_parsing import parse_run_config
from fedllm.errors import ConfigError
from fedllm.models.location import load_config
from fedllm.planning.memory import PROCESS_BYTES, memory_need
from fedllm.training import dp_sgd
from fedllm.training.task import RoundTask
from fedllm.wire.masking import WIRE
from fedllm.wire.messages import ARRAYS
from tests.helpers.client_replies import (
    JOINT,
    NODE,
    NUMBERS,
    RECORD,
    WITHOUT_DP,
    code_of,
    epsilon_of,
    text_of,
    values,
)
from tests.helpers.node_configs import node_of


@pytest.mark.parametrize(
    ("run", "most", "fitted"),
    [
        ((8, 1), 3, (2, 4)),
        ((6, 1), 4, (3, 2)),
        ((7, 1), 4, (1, 7)),
        ((3, 4), 2, (2, 6)),
        # A larger bound makes no larger micro-batch than the run's.
        ((4, 2), 64, (4, 2)),
    ],
)
def test_a_smaller_micro_batch_makes_the_same_step(run, most, fitted):
    names = ("train.batch-size", "train.gradient-accumulation")
    config = parse_run_config(dict(zip(names, run, strict=True)))

    got = fitted_to_machine(config, node_of(batch_size=most))

    assert (got.train.batch_size, got.train.gradient_accumulation) == fitted
    assert got.train.expected_batch_size == config.train.expected_batch_size
    line = micro_batch_line(config.train, got.train)
    assert (line == "") == (run == fitted)


def test_the_largest_micro_batch_that_fits_the_memory_is_taken(tiny_llama):
    config = parse_run_config({"model.name": str(tiny_llama), "adapter.rank": 4})
    need = memory_need(config, load_config(str(tiny_llama)), "cpu")
    fixed, each = PROCESS_BYTES + need.base + need.adapter, need.activations / 8

    def fitted(num_bytes: float) -> int:
        node = node_of(max_memory=num_bytes / 1e9)
        return fitted_to_machine(config, node).train.batch_size

    assert fitted(fixed + 8.01 * each) == 8
    assert fitted(fixed + 7.9 * each) == 4
    assert fitted(fixed + 1.01 * each) == 1
    with pytest.raises(ConfigError, match="max-memory: .*one example .*needs"):
        fitted(fixed + 0.9 * each)


@pytest.mark.parametrize("changes", [{}, WITHOUT_DP])
def test_a_client_with_smaller_micro_batches_sends_the_same_update(
    answer, arrays, home, changes
):
    whole = values(answer(changes), arrays)
    parts = values(answer(changes, {**NODE, "batch-size": 1}), arrays)

    for name, value in parts.items():
        # A bfloat16 base rounds a pass of two rows as it does not a pass of one.
        error = np.linalg.norm(value - whole[name])
        assert error < 0.03 * np.linalg.norm(whole[name] - arrays[name])
    log = (home / "logs" / "client-0.log").read_text()
    assert "micro-batches of 1 examples, 2 a step, of the run's 2 and 1" in log


@pytest.mark.parametrize("changes", [{}, WITHOUT_DP, {"train.optimizer": "adamw"}])
def test_a_client_without_time_sends_what_it_has_and_not_how_many_steps_it_made(
    answer, home, monkeypatch, changes
):
    def form(reply: Any) -> Any:
        sent = reply.content.array_records[ARRAYS]
        sizes = [(name, a.dtype, a.shape, len(a.data)) for name, a in sent.items()]
        return sorted(reply.content), sizes

    many = {**changes, "train.local-steps": 4}
    whole = answer(many)
    monkeypatch.setattr(RoundTask, "is_last_step", lambda self, done, began: done == 2)
    reply = answer(many, {**NODE, "max-seconds": 1e6})

    assert form(reply) == form(whole)
    if changes != WITHOUT_DP:
        assert set(reply.content) == {ARRAYS, WIRE}
    log = (home / "logs" / "client-0.log").read_text()
    assert "max-seconds 1e+06 ended the training after 2 steps" in log


def test_a_step_that_would_probably_end_too_late_does_not_begin(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("fedllm.training.task.time.monotonic", lambda: now[0])
    task = RoundTask({}, 0.1, stop_at=110.0)

    now[0] = 106.0
    assert not task.is_last_step(2, 100.0)
    now[0] = 107.0
    assert task.is_last_step(2, 100.0)
    assert not RoundTask({}, 0.1).is_last_step(2, 100.0)


def test_a_limit_that_leaves_no_step_is_one_line(answer):
    reply = answer(WITHOUT_DP, {**NODE, "max-seconds": 1e-9})

    assert code_of(reply) == "time-limit"
    assert "max-seconds: is over before the first step" in text_of(reply)


@pytest.mark.parametrize(
    ("run", "message"), [(RECORD, {}), (JOINT, {**NUMBERS, "total_rows": 10})]
)
def test_at_record_level_a_node_without_time_declines_before_it_reads_a_row(
    answer, monkeypatch, run, message
):
    node = {**NODE, "declared-rows": 5}
    assert ARRAYS in answer(run, {**node, "max-seconds": 1e6}, **message).content

    def read(*args: Any) -> None:
        raise AssertionError("a row was read")

    monkeypatch.setattr(message_handler, "client_records", read)
    short = answer(run, {**node, "max-seconds": 1e-9}, **message)
    assert code_of(short) == "time-limit"


@pytest.mark.parametrize(
    ("changes", "node"),
    [
        ({"data.person-column": "instruction"}, {"declared-rows": 5}),
        ({"train.local-steps": 0}, {}),
    ],
)
def test_at_record_level_time_is_refused_if_rows_would_decide(
    answer, home, changes, node
):
    reply = answer({**RECORD, **changes}, {**NODE, **node, "max-seconds": 1e6})

    assert code_of(reply) == "bad-config"
    assert "max-seconds: " in (home / "logs" / "client-0.log").read_text()


def test_at_record_level_limits_change_micro_batches_and_neither_plan_nor_epsilon(
    answer, monkeypatch
):
    seen = []
    real = record_budget.open_budget

    def note(*args: Any) -> Any:
        budget = real(*args)
        seen.append(budget.plan)
        return budget

    monkeypatch.setattr(record_budget, "open_budget", note)
    sizes = []
    summed = dp_sgd.clipped_sum

    def note_size(*args: Any) -> Any:
        sizes.append(args[2])
        return summed(*args)

    monkeypatch.setattr(dp_sgd, "clipped_sum", note_size)
    limited = {**NODE, "batch-size": 1, "max-seconds": 1e6}
    epsilons = [
        epsilon_of(answer(RECORD, node, server_round=1))
        for node in (NODE, {**limited, "partition-id": 1})
    ]

    assert seen[0] == seen[1]
    assert epsilons[0] == epsilons[1]
    assert sizes == [2, 1]
