"""What fails while a run goes on, and what the round makes of it.

Real processes that are killed are in tests/slow/test_real_faults.py.
"""

import errno
import os
import time
from typing import Any

import numpy as np
import pytest
from flwr.app import Message

from fedllm import atomic_files
from fedllm.errors import FedllmError
from fedllm.privacy.accounting import gaussian_epsilon
from tests.helpers.federations import (
    NO_PRIVACY,
    federation,
    kept,
    learner,
    lines_of,
    read,
    resumed,
)


def silent_in(rounds: set[int], nodes: set[int]) -> Any:
    """Clients that never answer in some rounds, as a killed or a hung one."""

    def answer(message: Message, context: Any) -> Message | None:
        config = message.content.config_records["config"]
        gone = message.metadata.dst_node_id in nodes
        if gone and config["server-round"] in rounds:
            return None
        return learner(message, context)

    return answer


def test_half_of_the_clients_gone_is_a_round_of_the_others(quick):
    answer = silent_in({2}, {100, 101, 102})
    given = {**quick, **NO_PRIVACY, "strategy.round-timeout": 1.0}
    run = federation(given, answer, num_clients=6)
    run.run()

    answered = [line["clients_answered"] for line in lines_of(run)[1:]]
    assert answered == [6, 3, 6]


def test_a_client_that_does_not_answer_counts_zero_under_dp_and_n_stays(quick):
    answer = silent_in({1, 2, 3}, {100})
    run = federation({**quick, "strategy.round-timeout": 1.0}, answer)
    run.run()

    told = read(run, "privacy.json")
    assert [line["clients_answered"] for line in lines_of(run)[1:]] == [2, 2, 2]
    assert told["num_sampled_clients"] == 3
    assert told["num_rounds"] == 3


def test_a_node_that_comes_back_with_another_id_takes_part_again(quick):
    def answer(message: Message, context: Any) -> Message | None:
        if message.metadata.dst_node_id == 101:
            # Killed in mid-training, and started again by its owner.
            run.grid.contexts[555] = run.grid.contexts.pop(101)
            return None
        return learner(message, context)

    run = federation({**quick, **NO_PRIVACY, "strategy.round-timeout": 1.0}, answer)
    run.run()

    assert run.population == [100, 555, 102]
    assert {m.metadata.dst_node_id for m in run.grid.sent[-3:]} == {100, 555, 102}
    assert lines_of(run)[3]["clients_answered"] == 3


@pytest.mark.parametrize("private", [False, True])
def test_a_disk_that_fills_up_ends_the_run_in_one_line_and_it_goes_on_later(
    quick, private
):
    given = quick if private else {**quick, **NO_PRIVACY}
    whole = federation(given)
    whole.run()

    for k in (4, 6, 7, 9, 11):
        run = federation(given)
        with pytest.MonkeyPatch.context() as patch:
            writes = iter(range(10_000))
            real = os.fsync

            def fsync(descriptor: int, writes=writes, real=real, k=k) -> None:
                if next(writes) >= k:
                    raise OSError(errno.ENOSPC, "No space left on device")
                real(descriptor)

            patch.setattr(atomic_files.os, "fsync", fsync)
            with pytest.raises(FedllmError, match="(?i)no space left"):
                run.run()
        resumed().run()
        if private:
            # A ledger that could not be written has paid for nothing.
            told = read(run, "privacy.json")
            spent = gaussian_epsilon(told["noise_multiplier"], 3, told["delta"])
            assert told["epsilon"] == pytest.approx(spent)
            assert len(set(told["releases"])) == 3
        else:
            assert kept(run.directory.path) == kept(whole.directory.path)


def test_a_clock_that_jumps_ends_no_round_and_makes_no_time_negative(
    quick, monkeypatch
):
    clock = time.time

    def answer(message: Message, context: Any) -> Message:
        # A day ahead, then two days back, as a wrong clock is set right.
        server_round = message.content.config_records["config"]["server-round"]
        jump = 86_400 * (1 if server_round == 1 else -1)
        monkeypatch.setattr(time, "time", lambda: clock() + jump)
        return learner(message, context)

    given = {**quick, **NO_PRIVACY, "strategy.round-timeout": 30.0}
    run = federation(given, answer)
    run.run()

    lines = lines_of(run)
    assert [line["clients_answered"] for line in lines[1:]] == [3, 3, 3]
    seconds = [value for line in lines for value in line["seconds"].values()]
    assert 0 <= min(seconds) <= max(seconds) < 30
    assert all(np.isfinite(value).all() for value in run.progress.arrays.values())
