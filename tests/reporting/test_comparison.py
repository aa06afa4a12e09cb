"""Intervals over seeds, and the worst client."""

import pytest

from fedllm.reporting.comparison import _cells, joining, summarise


def test_intervals_are_over_seeds_and_the_worst_client_has_the_highest_loss():
    rest = dict.fromkeys(
        (
            *("perplexity", "accuracy", "best_round", "examples"),
            *("seconds", "megabytes", "epsilon"),
        )
    )
    rows = [
        {"arm": f"alone-{i}", "seed": seed, "test_loss": 1.0 + i + seed, **rest}
        for i in range(2)
        for seed in range(2)
    ]
    summary = summarise(rows)
    assert summary["alone, worst"]["test_loss"]["mean"] == 2.5
    assert summary["alone, best"]["test_loss"]["mean"] == 1.5
    # t(1) = 12.706 and the standard error of 1 and 2 is 0.5.
    assert summary["alone, mean"]["test_loss"]["half_width_95"] == pytest.approx(6.353)
    assert summary["alone, mean"]["perplexity"] is None


def test_joining_is_judged_client_by_client_against_alone():
    losses = {
        "alone-0": 2.0,
        "alone-5": 3.0,
        "federated-dp": 2.5,
        "personal-federated-dp-0": 1.5,
        "personal-federated-dp-5": 2.0,
        "base": 4.0,
    }
    rows = [{"arm": arm, "seed": 0, "test_loss": x} for arm, x in losses.items()]

    joined = joining(rows)

    assert set(joined) == {"federated-dp", "personal-federated-dp"}
    shared, personal = joined["federated-dp"], joined["personal-federated-dp"]
    assert (shared["better"], shared["clients"]) == (1, 2)
    assert shared["gain"]["mean"] == 0.0
    assert (personal["better"], personal["clients"]) == (2, 2)
    assert personal["gain"]["mean"] == 0.75
    assert (
        joining([row for row in rows if row["arm"] != "alone-0"])[
            "personal-federated-dp"
        ]["clients"]
        == 1
    )
    assert joining([row for row in rows if not row["arm"].startswith("alone")]) == {}


def test_shares_of_pairs_are_columns_where_there_are_pairs():
    row = {"arm": "base", "seed": 0, "test_loss": 0.69}
    pairs = {"pairs_preferred": 0.0, "pairs_likelier": 0.5}

    head, (cells,) = _cells(summarise([row | pairs]))
    plain, _ = _cells(summarise([row]))

    assert dict(zip(head, cells, strict=True))["pairs likelier"] == "0.500"
    assert not any("pairs" in name for name in plain)
