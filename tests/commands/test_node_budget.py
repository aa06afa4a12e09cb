"""The owner looks up, renews and ends what the node's runs have spent."""

import json
from pathlib import Path

import pytest

from fedllm.client.node_budget import node_ledger_folder
from fedllm.commands import node
from fedllm.errors import BudgetError
from fedllm.privacy.accounting import calibrate
from fedllm.privacy.node_ledger import Asked, Limits, NodeLedger, Promise

DELTA = 1e-5
MONTHLY = Limits(8.0, DELTA, 30.0)


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("FEDLLM_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def charge(
    home: Path, run: str, epsilon: float, limits: Limits, server_round=1
) -> None:
    promise = Promise(
        "client", "all", 1.0, calibrate(epsilon, 5, DELTA, "all", 1.0), 5, DELTA
    )
    asked = Asked(run, 77, 77, server_round)
    NodeLedger(node_ledger_folder(home)).charge(asked, lambda: promise, limits)


def said(capsys, *arguments: str) -> str:
    node.main(list(arguments))
    return capsys.readouterr().out


def test_before_any_run_there_is_no_budget_to_show(home):
    for what in ("budget", "renew", "end"):
        with pytest.raises(SystemExit, match="no client-level run was charged"):
            node.main([what])
    assert not (home / "ledgers").exists()


def test_the_budget_is_what_was_spent_in_period_and_lifetime_by_run_and_what_is_left(
    capsys, home
):
    charge(home, "aaaa", 6.0, MONTHLY)
    node.main(["renew", "--early"])
    capsys.readouterr()
    charge(home, "bbbb", 4.0, MONTHLY)

    told = said(capsys, "budget")

    assert "limit: epsilon 8 for a period of 30 days" in told
    assert "period 2 since" in told and "epsilon 4.00 spent, left for one more" in told
    lifetime = float(told.split("lifetime: epsilon ")[1].split()[0])
    assert 7.0 < lifetime < 8.5
    assert "run aaaa (77): period 1" in told and "epsilon 6.00, ended" in told
    assert "run bbbb (77): period 2" in told and "1 asked for, epsilon 4.00\n" in told
    assert "whether the server adds that noise no node can see" in told


def test_without_a_period_the_budget_is_the_lifetimes(capsys, home):
    charge(home, "aaaa", 8.0, Limits(8.0, DELTA))

    told = said(capsys, "budget")

    assert "limit: epsilon 8 for the lifetime" in told
    assert "lifetime: epsilon 8.00 spent, nothing is left" in told
    with pytest.raises(SystemExit, match="no period to renew"):
        node.main(["renew"])


def test_a_node_without_a_limit_is_shown_what_it_spent(capsys, home):
    charge(home, "aaaa", 8.0, Limits(None, DELTA))

    told = said(capsys, "budget")

    assert "no limit (max-epsilon)" in told
    assert "lifetime: epsilon 8.00 spent\n" in told


def test_a_period_is_renewed_by_its_owner_and_not_too_soon_by_mistake(capsys, home):
    charge(home, "aaaa", 8.0, MONTHLY)
    with pytest.raises(SystemExit, match="0.0 of its 30 days have passed: --early"):
        node.main(["renew"])

    assert "period 2 has begun" in said(capsys, "renew", "--early")

    charge(home, "bbbb", 8.0, MONTHLY)
    with pytest.raises(BudgetError):
        charge(home, "aaaa", 8.0, MONTHLY, server_round=2)


def test_a_run_that_is_ended_is_shown_with_what_it_cost(capsys, home):
    charge(home, "aaaa", 8.0, MONTHLY)

    told = said(capsys, "end", "aa")

    assert told.startswith("ended: run aaaa") and "1 asked for, epsilon" in told
    assert "epsilon 8.00" not in told
    with pytest.raises(SystemExit, match="0 runs begin so"):
        node.main(["end", "bb"])


def test_the_whole_ledger_is_there_as_json(capsys, home):
    charge(home, "aaaa", 4.0, MONTHLY)

    report = json.loads(said(capsys, "budget", "--json"))

    assert 3.99 < report["epsilon_of_period"] == report["epsilon_of_lifetime"] <= 4.0
    assert report["runs"][0]["promise"]["rounds"] == 5
    assert report["limits"]["max_epsilon"] == 8.0
