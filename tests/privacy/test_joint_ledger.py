"""The ledger of a run with one noise: its epsilon by dp-accounting alone, and its file."""

import json
from dataclasses import replace

import dp_accounting
import pytest
from dp_accounting import pld

from fedllm.errors import PrivacyError
from fedllm.privacy.group_privacy import group_epsilon
from fedllm.privacy.joint_ledger import JointLedger, JointSettings
from fedllm.privacy.wording import plain

SETTINGS = JointSettings(
    unit="record",
    noise="joint",
    sampling="all",
    population_size=3,
    num_sampled_clients=3,
    declared_rows=(100, 200, 340),
    expected_batch_size=64,
    max_grad_norm=1.0,
    noise_multiplier=1.2,
    delta=1e-5,
    target_epsilon=0.0,
    max_epsilon=0.0,
    num_trainable=10,
    planned_rounds=4,
)


def opened(tmp_path, **changes):
    settings = replace(SETTINGS, **changes)
    return JointLedger.create(tmp_path / "privacy.json", settings, "a-run")


def content_of(tmp_path):
    return json.loads((tmp_path / "privacy.json").read_text())


def test_epsilon_is_that_of_dp_accounting_alone(tmp_path):
    ledger = opened(tmp_path)
    for server_round in (1, 2, 3):
        ledger.spend(server_round)

    relation = dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE
    accountant = pld.PLDAccountant(relation)
    step = dp_accounting.PoissonSampledDpEvent(
        64 / 640, dp_accounting.GaussianDpEvent(1.2)
    )
    accountant.compose(step, 3)
    content = content_of(tmp_path)
    assert content["epsilon"] == pytest.approx(accountant.get_epsilon(1e-5), rel=1e-6)
    assert content["accountant"] == "PLD (dp-accounting)"
    assert content["sampling_probability"] == 0.1
    assert content["neighbouring_relation"] == "add-or-remove one record"


def epsilon_by_dp_accounting(z, steps):
    relation = dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE
    accountant = pld.PLDAccountant(relation)
    step = dp_accounting.PoissonSampledDpEvent(
        64 / 640, dp_accounting.GaussianDpEvent(z)
    )
    accountant.compose(step, steps)
    return accountant.get_epsilon(1e-5)


def test_both_epsilons_of_a_sealed_run_are_those_of_dp_accounting_alone(tmp_path):
    ledger = opened(tmp_path, trustees=5, colluding=2)
    for server_round in (1, 2):
        ledger.spend(server_round)

    content = content_of(tmp_path)
    # Against the server with two trustees, and against whoever sees the adapters: 5 noises.
    server = epsilon_by_dp_accounting(1.2, 2)
    adapters = epsilon_by_dp_accounting(1.2 * (5 / 3) ** 0.5, 2)
    assert content["epsilon"] == pytest.approx(server, rel=1e-6)
    assert content["epsilon_adapters"] == pytest.approx(adapters, rel=1e-6)
    assert adapters < server
    assert ledger.noise_to_signal == pytest.approx(1.2 * (5 / 3) ** 0.5 * 10**0.5 / 64)


def test_a_sealed_runs_statement_says_against_whom_and_trusts_no_server(tmp_path):
    opened(tmp_path, trustees=3, colluding=1).spend(1)

    content = content_of(tmp_path)
    assert (content["trustees"], content["colluding"]) == (3, 1)
    assert "at most 1 of the 3 trustees, and receives what this run" in (
        content["statement"]
    )
    assert "is trusted" not in content["statement"]
    left_out = " ".join(content["not_covered"])
    assert content["not_covered"][0].startswith("the server, if more than 1")
    assert "before the noise" not in left_out and "by which code" not in left_out
    assert "which the opened sum tells of under its noise" in left_out
    assert "put back to an older" in left_out


def test_a_ledger_whose_second_epsilon_was_edited_is_not_loaded(tmp_path):
    opened(tmp_path, trustees=3, colluding=1).spend(1)
    path = tmp_path / "privacy.json"
    content = content_of(tmp_path)
    path.write_text(json.dumps({**content, "epsilon_adapters": 0.01}))

    with pytest.raises(PrivacyError, match="epsilon_adapters"):
        JointLedger.load(path)


def test_a_ledger_from_before_there_were_trustees_is_that_of_a_trusted_server(tmp_path):
    ledger = opened(tmp_path)
    path = tmp_path / "privacy.json"
    before = {**content_of(tmp_path), "trustees": None, "colluding": None}
    path.write_text(json.dumps(before))

    loaded = JointLedger.load(path)

    loaded.check_same(ledger.settings)
    assert "is trusted" in loaded.as_dict()["statement"]


def test_the_statement_names_the_row_the_number_and_who_is_trusted(tmp_path):
    opened(tmp_path).spend(1)

    content = content_of(tmp_path)
    assert "one training record of a client" in content["statement"]
    assert "the server, which receives each client's sum" in content["statement"]
    assert "is trusted" in content["statement"]
    assert content["not_covered"][0].startswith("the server")


def test_a_ledger_comes_back_as_it_was_and_an_edited_one_does_not(tmp_path):
    ledger = opened(tmp_path)
    ledger.spend(1)

    again = JointLedger.load(tmp_path / "privacy.json")
    again.check_same(SETTINGS)
    assert again.releases == [1]
    assert again.spent == ledger.spent
    with pytest.raises(PrivacyError, match="declared_rows was"):
        again.check_same(replace(SETTINGS, declared_rows=(100, 200, 341)))
    content = content_of(tmp_path)
    content["declared_rows"][0] = 10**6
    (tmp_path / "privacy.json").write_text(json.dumps(content))
    with pytest.raises(PrivacyError, match="sampling_probability is"):
        JointLedger.load(tmp_path / "privacy.json")


def test_no_more_steps_are_admitted_than_the_noise_is_for(tmp_path):
    ledger = opened(tmp_path, target_epsilon=2.0, planned_rounds=1)
    ledger.spend(1)

    with pytest.raises(PrivacyError, match="pass the budget"):
        ledger.spend(2)
    assert content_of(tmp_path)["releases"] == [1]


def test_with_persons_the_statement_names_them_and_what_two_clients_cost(tmp_path):
    ledger = opened(tmp_path, person_column="patient")
    for server_round in (1, 2, 3):
        ledger.spend(server_round)

    content = content_of(tmp_path)
    two = group_epsilon((1.2, 0.1, 3), 1e-5, 2)
    assert content["epsilon_two_clients"] == two > content["epsilon"]
    assert content["neighbouring_relation"].startswith("add-or-remove one record, all")
    statement = content["statement"]
    assert "all training rows of one person in one client (by 'patient')" in statement
    assert f"epsilon {plain(two)} for a person with rows at two clients" in statement
    lines = content["not_covered"]
    assert any(line.startswith("a person at several clients") for line in lines)
    assert not any("the bound is for one row" in line for line in lines)
    again = JointLedger.load(tmp_path / "privacy.json")
    assert (again.settings.person_column, again.two_clients) == ("patient", two)


def test_with_rows_nothing_is_said_of_persons_and_an_older_file_is_read(tmp_path):
    opened(tmp_path).spend(1)
    path = tmp_path / "privacy.json"
    content = content_of(tmp_path)
    assert content["epsilon_two_clients"] is None
    assert any("the bound is for one row" in line for line in content["not_covered"])
    del content["person_column"], content["epsilon_two_clients"]
    path.write_text(json.dumps(content))

    assert JointLedger.load(path).settings == SETTINGS
    changed = replace(SETTINGS, person_column="patient")
    with pytest.raises(PrivacyError, match="person_column was '' and is now 'patient'"):
        JointLedger.load(path).check_same(changed)
