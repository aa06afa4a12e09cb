"""One budget over all runs of a node."""

import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from fedllm.errors import BudgetError, NodeError
from fedllm.privacy.accounting import calibrate, gaussian_epsilon
from fedllm.privacy.composition import composed_epsilon
from fedllm.privacy.node_ledger import Asked, Limits, NodeLedger, Promise

DELTA = 1e-5
LIMITS = Limits(8.0, DELTA)
MONTHLY = Limits(8.0, DELTA, 30.0)


def promise(epsilon: float = 4.0) -> Promise:
    z = calibrate(epsilon, 5, DELTA, "all", 1.0)
    return Promise("client", "all", 1.0, z, 5, DELTA)


COINS = Promise("client", "poisson", 0.3, 2.5, 3, DELTA)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "ledgers/node"


@pytest.fixture
def ledger(folder: Path) -> NodeLedger:
    return NodeLedger(folder)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    class Clock:
        now = 1_800_000_000.0

    monkeypatch.setattr(time, "time", lambda: Clock.now)
    return Clock


def ask(
    ledger: NodeLedger,
    run: str,
    server_round: int | None = 1,
    promised: Promise | None = None,
    limits: Limits = LIMITS,
    attempt: int = 1,
) -> bool:
    asked = Asked(run, 1, attempt, server_round)
    return ledger.charge(asked, lambda: promised or promise(), limits)


def spent(ledger: NodeLedger, period: int | None = None) -> float:
    return composed_epsilon(ledger.account().events(period), DELTA)


def test_a_run_is_charged_whole_with_its_first_message_and_once(ledger):
    assert ask(ledger, "a")
    assert not any(ask(ledger, "a", server_round) for server_round in range(1, 6))

    assert spent(ledger) == gaussian_epsilon(promise().noise_multiplier, 5, DELTA)


def test_two_runs_that_together_pass_the_budget_the_second_is_refused(ledger):
    ask(ledger, "a", promised=promise(6.0))

    for server_round in (1, 2):
        with pytest.raises(BudgetError, match="run b and the others.*above.* 8: "):
            ask(ledger, "b", server_round, promise(5.0))
    assert not ask(ledger, "a", 2)
    assert [run.run for run in ledger.account().runs] == ["a"]
    assert ask(ledger, "c", promised=promise(3.0))
    assert spent(ledger) < 8.0


CHARGING = """
import sys, time
from pathlib import Path
from fedllm.errors import BudgetError
from fedllm.privacy.node_ledger import Asked, Limits, NodeLedger, Promise
ledger = NodeLedger(Path(sys.argv[1]))
def promise():
    time.sleep(0.05)
    return Promise("client", "all", 1.0, float(sys.argv[3]), 5, 1e-5)
print("ready", flush=True)
sys.stdin.readline()
for number in range(8):
    try:
        asked = Asked(f"{sys.argv[2]}{number}", 1, 1, 1)
        ledger.charge(asked, promise, Limits(8.0, 1e-5))
        print("charged", flush=True)
    except BudgetError:
        pass
"""


def test_two_processes_at_once_do_not_pass_the_budget_together(ledger, folder):
    z = str(promise(3.0).noise_multiplier)
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", CHARGING, str(folder), name, z],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for name in "ab"
    ]
    for run in runs:
        assert run.stdout.readline() == "ready\n"
    for run in runs:
        run.stdin.write("\n")
        run.stdin.flush()
    charged = sum(run.communicate(timeout=30)[0].count("charged") for run in runs)

    assert [run.returncode for run in runs] == [0, 0]
    assert charged == len(ledger.account().runs) >= 4
    assert spent(ledger) <= 8.0


def test_a_run_of_just_the_limit_fits_an_empty_ledger_and_nothing_after_it(ledger):
    ask(ledger, "a", promised=promise(8.0))

    with pytest.raises(BudgetError):
        ask(ledger, "b", promised=promise(0.01))


def test_epsilons_are_composed_and_never_added(ledger):
    for name in "abcd":
        ask(ledger, name, promised=promise(3.0))

    assert 6.0 < spent(ledger) < 8.0


def test_the_charge_survives_a_restart(ledger, folder):
    ask(ledger, "a", promised=promise(6.0))

    with pytest.raises(BudgetError):
        ask(NodeLedger(folder), "b", promised=promise(6.0))


def test_rounds_that_were_not_planned_are_refused_whichever_came_before(ledger):
    ask(ledger, "a", 5)

    for server_round in (6, 0, -1):
        with pytest.raises(BudgetError, match="5 were planned"):
            ask(ledger, "a", server_round)
    with pytest.raises(BudgetError, match="0 were planned"):
        ask(ledger, "none", 1, replace(promise(), rounds=0))


def test_a_resumed_run_repeats_the_round_that_was_cut_off_and_is_not_charged_again(
    ledger,
):
    ask(ledger, "a", 1)
    ask(ledger, "a", 2)
    before = spent(ledger)

    assert not ask(ledger, "a", 2, attempt=2)
    assert not ask(ledger, "a", 3, attempt=2)
    assert spent(ledger) == before
    assert ledger.account().runs[0].rounds == (1, 2, 3)


def test_a_run_resumed_from_an_older_copy_is_refused(ledger):
    for server_round in (1, 2, 3):
        ask(ledger, "a", server_round)

    with pytest.raises(BudgetError, match="resumes at round 2, and round 3"):
        ask(ledger, "a", 2, attempt=2)


def test_a_run_that_was_resumed_does_not_go_on_beside_what_resumed_it(ledger):
    ask(ledger, "a", 1)
    ask(ledger, "a", 1, attempt=2)

    with pytest.raises(BudgetError, match="was resumed as 2, and 1 asks"):
        ask(ledger, "a", 2)


def test_a_run_announced_before_its_coins_is_charged_as_sampled(ledger):
    ask(ledger, "a", None, COINS)

    sampled = composed_epsilon([(2.5, 0.3, 3)], DELTA)
    assert spent(ledger) == sampled < gaussian_epsilon(2.5, 3, DELTA)
    ask(ledger, "a", 2, COINS)
    assert spent(ledger) == sampled


def test_nothing_tells_which_rounds_of_secret_coins_were_answered(ledger):
    ask(ledger, "a", None, COINS)
    before = ledger.account()

    for server_round in (1, 3):
        ask(ledger, "a", server_round)

    assert ledger.account() == before
    ledger.end("a")
    assert ledger.account().events() == before.events()


def test_coins_that_nobody_announced_claim_no_amplification(ledger):
    ask(ledger, "a", 3, COINS, limits=Limits(100.0, DELTA))

    assert spent(ledger) == gaussian_epsilon(2.5, 3, DELTA)
    assert not ask(ledger, "a", None, limits=Limits(100.0, DELTA))
    assert spent(ledger) == gaussian_epsilon(2.5, 3, DELTA)


def test_an_announced_run_is_refused_whether_or_not_it_was_drawn(ledger):
    ask(ledger, "a", promised=promise(8.0))

    for server_round in (None, 1, 2):
        with pytest.raises(BudgetError):
            ask(ledger, "b", server_round, COINS)


def test_an_owner_who_lowers_the_limit_is_heeded_in_the_next_message(ledger):
    ask(ledger, "a", promised=promise(6.0))

    with pytest.raises(BudgetError):
        ask(ledger, "a", 2, limits=Limits(5.0, DELTA))


def test_without_a_limit_runs_are_counted_all_the_same(ledger):
    for name in "ab":
        ask(ledger, name, promised=promise(8.0), limits=Limits(None, DELTA))

    assert spent(ledger) > 12
    with pytest.raises(BudgetError):
        ask(ledger, "c", promised=promise(0.1))


def test_a_renewed_period_bounds_that_period_and_the_lifetime_stands_beside_it(
    ledger, clock
):
    ask(ledger, "a", promised=promise(8.0), limits=MONTHLY)
    clock.now += 31 * 86_400
    ledger.renew()

    ask(ledger, "b", promised=promise(8.0), limits=MONTHLY)

    assert spent(ledger, 1) == spent(ledger, 2) <= 8.0
    assert 12 < spent(ledger) < 12.5
    with pytest.raises(BudgetError, match="the others of this period"):
        ask(ledger, "c", limits=MONTHLY)


def test_no_clock_ends_a_period_and_none_that_is_put_back_renews_one(ledger, clock):
    ask(ledger, "a", promised=promise(8.0), limits=MONTHLY)

    for days in (400, -800, 2):
        clock.now += days * 86_400
        with pytest.raises(BudgetError):
            ask(ledger, "b", limits=MONTHLY)
    with pytest.raises(NodeError, match="-398.0 of its 30 days"):
        ledger.renew()
    with pytest.raises(BudgetError):
        ask(ledger, "b", limits=MONTHLY)


def test_a_period_is_renewed_early_only_if_the_owner_says_so(ledger, clock):
    ask(ledger, "a", limits=MONTHLY)

    with pytest.raises(NodeError, match="0.0 of its 30 days have passed: --early"):
        ledger.renew()
    assert ledger.renew(early=True).period == 2


@pytest.mark.parametrize("charged", [True, False])
def test_without_a_period_there_is_nothing_to_renew(ledger, charged):
    if charged:
        ask(ledger, "a")

    with pytest.raises(NodeError, match="no period to renew"):
        ledger.renew(early=True)


def test_a_run_ends_with_the_period_that_it_was_charged_in(ledger):
    ask(ledger, "a", limits=MONTHLY)
    ledger.renew(early=True)

    with pytest.raises(BudgetError, match="ended period 1"):
        ask(ledger, "a", 2, limits=MONTHLY)


def test_without_a_period_any_more_the_limit_is_the_lifetimes(ledger):
    ask(ledger, "a", promised=promise(8.0), limits=MONTHLY)
    ledger.renew(early=True)

    with pytest.raises(BudgetError, match="its lifetime"):
        ask(ledger, "b")


def test_a_run_that_its_owner_ends_costs_the_rounds_that_it_asked_for(ledger):
    # The third after the fourth, as two messages may overtake each other.
    for server_round in (1, 4, 3, 3):
        ask(ledger, "abc", server_round)

    ledger.end("ab")

    assert spent(ledger) == gaussian_epsilon(promise().noise_multiplier, 3, DELTA)
    with pytest.raises(BudgetError, match="owner ended it"):
        ask(ledger, "abc", 3)


@pytest.mark.parametrize("prefix", ["", "x", "a"])
def test_a_run_is_ended_by_digits_that_are_its_alone(ledger, prefix):
    ask(ledger, "ab")
    ask(ledger, "ac")

    with pytest.raises(NodeError, match="runs begin so"):
        ledger.end(prefix)


def test_the_account_lists_runs_by_when_they_were_charged(ledger, monkeypatch):
    ticks = count(1_000.0)
    monkeypatch.setattr(time, "time", lambda: next(ticks))
    for name in "cab":
        ask(ledger, name, promised=promise(2.0))

    assert [run.run for run in ledger.account().runs] == ["c", "a", "b"]
    assert ledger.account().limits == LIMITS
