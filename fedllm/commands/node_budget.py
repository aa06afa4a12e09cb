"""The lines of `fedllm node budget`, `renew` and `end`: what a node's runs have spent."""

import time
from dataclasses import asdict
from typing import Any

from fedllm.client.node_budget import node_ledger_folder
from fedllm.config import fedllm_home
from fedllm.errors import NodeError
from fedllm.privacy.composition import composed_epsilon, room_left
from fedllm.privacy.node_ledger import Account, ChargedRun, Limits, NodeLedger
from fedllm.privacy.wording import plain, rounds_text

_NOT_COUNTED = (
    "counted is what each client-level run promised: whether the server adds that noise no "
    "node can see; runs without privacy, and what record level spends on a row, are not in it"
)


def budget_lines() -> list[str]:
    """Return what was spent in the period, in the lifetime and by each run, and what is left."""
    account = _ledger().account()
    limits = account.limits
    if limits is None:
        return ["no client-level run was charged"]
    delta = limits.delta
    lifetime = composed_epsilon(account.events(), delta)
    lines = [_limit_line(limits)]
    if limits.period_days is not None:
        spent = composed_epsilon(account.events(account.period), delta)
        began = _day(account.began[-1])
        lines.append(
            f"period {account.period} since {began}: epsilon {plain(spent)} spent"
            + _left(spent, limits)
        )
        lines.append(f"lifetime: epsilon {plain(lifetime)} spent")
    else:
        lines.append(
            f"lifetime: epsilon {plain(lifetime)} spent" + _left(lifetime, limits)
        )
    lines += [_run_line(run, account, delta) for run in account.runs]
    return [*lines, _NOT_COUNTED]


def renew_lines(early: bool) -> list[str]:
    """Begin a new period."""
    account = _ledger().renew(early)
    return [
        f"period {account.period} has begun: the runs of the one before get no update any "
        "more",
        "it has a max-epsilon of its own; what all periods spent together: fedllm node budget",
    ]


def end_lines(prefix: str) -> list[str]:
    """End a run, so that it gets no update any more."""
    ledger = _ledger()
    run = ledger.end(prefix)
    return [f"ended: {_run_line(run, ledger.account(), _delta(ledger.account()))}"]


def budget_report() -> dict[str, Any]:
    """Return the whole ledger, and what it comes to."""
    account = _ledger().account()
    if account.limits is None:
        return {"runs": [], "limits": None}
    delta = account.limits.delta
    return {
        "limits": asdict(account.limits),
        "period": account.period,
        "began": list(account.began),
        "epsilon_of_period": composed_epsilon(account.events(account.period), delta),
        "epsilon_of_lifetime": composed_epsilon(account.events(), delta),
        "runs": [
            {**asdict(run), "epsilon": composed_epsilon([run.event], delta)}
            for run in account.runs
        ],
        "not_counted": _NOT_COUNTED,
    }


def _ledger() -> NodeLedger:
    """Return this node's ledger.

    Raises:
        NodeError: There is none yet.
    """
    folder = node_ledger_folder(fedllm_home())
    if not folder.exists():
        raise NodeError(
            f"{folder}: no client-level run was charged under this home: --home names "
            "the node's"
        )
    return NodeLedger(folder)


def _delta(account: Account) -> float:
    if account.limits is None:
        raise NodeError("no client-level run was charged")
    return account.limits.delta


def _limit_line(limits: Limits) -> str:
    if limits.max_epsilon is None:
        return f"no limit (max-epsilon), at delta {limits.delta:g}"
    span = (
        "the lifetime"
        if limits.period_days is None
        else f"a period of {limits.period_days:g} days, which fedllm node renew ends"
    )
    return (
        f"limit: epsilon {limits.max_epsilon:g} for {span}; zero-out, at delta "
        f"{limits.delta:g}"
    )


def _left(spent: float, limits: Limits) -> str:
    """Return what is left, as the one more run that would fit: epsilons do not add up."""
    if limits.max_epsilon is None:
        return ""
    left = room_left(spent, limits.delta, limits.max_epsilon)
    if left < 0.01:
        return ", nothing is left"
    return f", left for one more run of about {left:.2f}"


def _run_line(run: ChargedRun, account: Account, delta: float) -> str:
    """Return a run in a line. Of secret coins nothing is known of single rounds."""
    promise = run.promise
    words = [
        f"run {run.run} ({run.run_id}): period {run.period}, {_day(run.charged)}",
        f"{rounds_text(promise.rounds)} of noise multiplier {promise.noise_multiplier:.4g}",
        f"sampling {promise.sampling}",
    ]
    if promise.sampling == "poisson":
        counted = (
            f"amplified by q {promise.sampling_probability:g}"
            if run.amplified
            else "not announced, so not amplified"
        )
        words.append(counted)
    if not run.amplified:
        words.append(f"{len(run.rounds)} asked for")
    epsilon = plain(composed_epsilon([run.event], delta))
    is_open = not run.ended and run.period == account.period
    words.append(f"epsilon {epsilon}" + ("" if is_open else ", ended"))
    return ", ".join(words)


def _day(seconds: float) -> str:
    return time.strftime("%Y-%m-%d", time.gmtime(seconds))
