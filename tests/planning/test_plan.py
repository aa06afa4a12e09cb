"""The plan's figures, against dp_accounting and what was measured."""

import pytest
from dp_accounting import GaussianDpEvent, SelfComposedDpEvent
from dp_accounting.pld import PLDAccountant

from tests.helpers.plans import planned, told


def test_epsilon_and_noise_are_dp_accountings(capsys):
    there = planned(capsys, "--clients", "20", "--rounds", "5", "--epsilon", "8")
    back = planned(
        capsys, "--clients", "20", "--rounds", "5",
        "--noise-multiplier", str(there["noise_multiplier"]),
    )  # fmt: skip

    accountant = PLDAccountant()
    event = GaussianDpEvent(there["noise_multiplier"])
    accountant.compose(SelfComposedDpEvent(event, 5))
    assert there["epsilon"] == pytest.approx(accountant.get_epsilon(1e-5), rel=1e-3)
    assert back["epsilon"] == pytest.approx(there["epsilon"])
    assert there["noise_multiplier"] == pytest.approx(1.342, abs=1e-3)
    assert there["epsilon_replace_one"] == pytest.approx(19.12, abs=0.01)


def test_no_kind_is_advised_for_what_it_did_with_less_noise(capsys):
    found = planned(capsys, "--clients", "20", "--epsilon", "1")

    changes = [row["change"] for row in found["better"]]
    assert "100 clients" in changes
    assert not any(change.startswith("adapter.kind") for change in changes)


@pytest.mark.parametrize(
    ("kind", "d"),
    [
        ("ffa-lora", 184_320),
        ("lora-core", 3_840),
        ("lora", 460_800),
        ("ia3", 57_600),
        ("vera", 23_520),
    ],
)
def test_trained_values_are_counted_without_the_model(capsys, kind, d):
    assert planned(capsys, "--kind", kind)["num_trainable"] == d


def test_more_clients_are_expected_to_help_and_the_figures_are_said(capsys):
    few = planned(capsys, "--clients", "20", "--epsilon", "2")
    many = planned(capsys, "--clients", "200", "--epsilon", "2")

    assert many["expected"]["test_loss"] < few["expected"]["test_loss"]
    changes = {row["change"]: row["test_loss"] for row in few["better"]}
    assert changes["100 clients"] < few["expected"]["test_loss"]
    assert list(changes.values()) == sorted(changes.values())


def test_fewer_rounds_than_were_measured_are_no_promise(capsys):
    assert "fewer are fewer steps" in told(capsys, "--rounds", "1")
    assert "fewer are fewer steps" not in told(capsys, "--rounds", "8")
    changes = [row["change"] for row in planned(capsys, "--rounds", "8")["better"]]
    assert changes and not any("rounds" in change for change in changes)


def test_the_step_by_rule_is_in_units_of_the_clipping_norm(capsys):
    plain = planned(capsys)
    smaller = planned(capsys, "--run-config", "privacy.clipping-norm=0.3")

    assert plain["server_learning_rate_by_rule"] == pytest.approx(0.60, abs=0.01)
    assert smaller["server_learning_rate_by_rule"] == pytest.approx(1.20, abs=0.02)
    assert planned(capsys, "--kind", "ia3")["server_learning_rate_by_rule"] is None
    assert "strategy.server-learning-rate 0.6 on" in told(capsys)
