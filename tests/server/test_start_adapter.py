"""A run that starts from an adapter: what its epsilon counts, and what it leaves out."""

import json
from dataclasses import replace

import dp_accounting
import numpy as np
import pytest
from dp_accounting import pld
from flwr.app import Message, MetricRecord, RecordDict

from fedllm.config_parsing import parse_run_config
from fedllm.errors import AdapterError, ConfigError, PrivacyError
from fedllm.evaluation.public_rows import PublicRows
from fedllm.planning.record_noise import record_settings
from fedllm.privacy.joint_ledger import JointLedger
from fedllm.privacy.ledger import Ledger
from fedllm.privacy.record_claims import RecordClaims
from fedllm.wire.masking import masked
from fedllm.wire.messages import DECLARED_ROWS, METRICS
from tests.helpers.federations import (
    JOINT,
    NO_PRIVACY,
    cut_in_round,
    federation,
    resumed,
)

TARGET = {"privacy.target-epsilon": 4.0}


def run_of(given, **more):
    run = federation(given, **more)
    run.run()
    return run


def privacy_of(run):
    return json.loads((run.directory.path / "privacy.json").read_text())


def started(given, first, folder="peft_final", **more):
    path = str(first.directory.path / folder)
    return {**given, "adapter.start-from": path, **more}


def declarer(message, context):
    """A client that declares eight rows."""
    content = RecordDict({METRICS: MetricRecord({DECLARED_ROWS: 8})})
    return Message(masked(content), reply_to=message)


def epsilon_of(noise_multipliers, delta):
    relation = dp_accounting.NeighboringRelation.REPLACE_SPECIAL
    accountant = pld.PLDAccountant(relation)
    for z in noise_multipliers:
        accountant.compose(dp_accounting.GaussianDpEvent(z))
    return accountant.get_epsilon(delta)


def test_a_chain_of_runs_has_one_epsilon_and_one_target(quick):
    first = run_of({**quick, **TARGET})
    given = {**quick, "num-server-rounds": 2, "privacy.target-epsilon": 8.0}
    second = run_of(started(given, first))
    given["privacy.target-epsilon"] = 9.0
    third = run_of(started(given, second))

    contents = [privacy_of(run) for run in (first, second, third)]
    noise = [c["noise_multiplier"] for c in contents for _ in c["releases"]]
    assert [c["num_rounds"] for c in contents] == [3, 2, 2]
    for content, count in zip(contents, (3, 5, 7), strict=True):
        theirs = epsilon_of(noise[:count], content["delta"])
        assert content["epsilon"] == pytest.approx(theirs, rel=2e-3)
        assert content["epsilon"] <= content["target_epsilon"]
    assert [c["epsilon"] for c in contents] == pytest.approx([4, 8, 9], rel=1e-6)
    assert "the runs whose adapter it started from" in contents[1]["statement"]
    assert contents[1]["not_covered"] == contents[0]["not_covered"]
    assert Ledger.load(third.directory.path / "privacy.json").spent == pytest.approx(9)


def test_round_zero_is_the_start_adapter_and_stays_if_no_round_beats_it(
    quick, monkeypatch
):
    first = run_of({**quick, **NO_PRIVACY})
    second = federation(started({**quick, **NO_PRIVACY}, first))
    start = second.progress.arrays
    monkeypatch.setattr(
        PublicRows,
        "validation_loss",
        lambda self, arrays: 1.0 + any((arrays[k] != start[k]).any() for k in start),
    )
    theirs = first.progress.arrays
    assert all(np.array_equal(start[name], theirs[name]) for name in start)

    result = second.run()

    best = second.directory.path / "peft_best"
    assert result["best_round"] == 0 and result["recommended"] == str(best)
    for folder in (best, second.directory.path / "peft_0"):
        origin = json.loads((folder / "fedllm.json").read_text())
        assert origin["server_round"] == 0


def test_a_target_that_is_spent_is_an_error(quick):
    first = run_of({**quick, **TARGET})

    with pytest.raises(PrivacyError, match=r"must be above 4, which the runs that"):
        federation(started({**quick, **TARGET}, first))


def test_max_epsilon_bounds_the_chain(quick):
    noise = {"privacy.target-epsilon": 0.0, "privacy.noise-multiplier": 2.0}
    first = run_of({**quick, **noise})
    spent = privacy_of(first)["epsilon"]
    second = run_of(
        started({**quick, **noise, "privacy.max-epsilon": spent * 1.2}, first)
    )

    assert 0 < len(privacy_of(second)["releases"]) < 3
    assert privacy_of(second)["epsilon"] <= spent * 1.2


POISSON = {"strategy.sampling": "poisson"}


@pytest.mark.parametrize(
    ("before", "after", "clients"),
    [(POISSON, {}, 4), ({}, POISSON, 4), ({}, {}, 3), ({}, {}, 4)],
)
def test_what_does_not_match_stands_beside(quick, before, after, clients):
    noise = {
        "privacy.target-epsilon": 0.0,
        "privacy.noise-multiplier": 2.0,
        "strategy.fraction-train": 0.5,
        "strategy.sampling": "fixed",
    }
    first = run_of({**quick, **noise, **before}, num_clients=4)
    given = started({**quick, **noise, **after}, first)

    content = privacy_of(federation(given, num_clients=clients))

    beside = [
        note
        for note in content["not_covered"]
        if f"run {first.directory.path.name}, whose adapter" in note
        and "stands beside this one" in note
    ]
    if not before and not after and clients == 4:
        assert content["earlier_mu_squared"] == 3 / 2**2 and not beside
    else:
        assert content["earlier_mu_squared"] == 0 and len(beside) == 1


def test_without_a_ledger_no_total_is_claimed_unless_the_adapter_is_public(quick):
    public = run_of({**quick, **NO_PRIVACY})
    second = run_of(started(quick, public))
    third = run_of(started(quick, second, **{"privacy.target-epsilon": 20.0}))
    declared = run_of(started(quick, public, **{"adapter.start-is-public": True}))

    for run in (second, third):
        content = privacy_of(run)
        assert content["earlier_mu_squared"] == 0
        assert "is no ledger that could be checked" in content["not_covered"][-1]
    assert "ledger that could" not in "".join(privacy_of(declared)["not_covered"])


def test_record_level_names_the_run_before_and_keeps_its_name(quick):
    first = run_of({**quick, **TARGET})
    given = {**quick, **JOINT}
    path = federation(started(given, first), declarer).directory.path / "privacy.json"
    content = json.loads(path.read_text())

    assert content["noise"] == "joint"
    assert f"run {first.directory.path.name}, whose" in content["not_covered"][-1]
    note = content["start_note"]
    assert JointLedger.load(path).settings.start_note == note

    settings = replace(
        record_settings(parse_run_config({"privacy.unit": "record"}), 3, 10),
        start_note=note,
    )
    other = path.with_name("claims.json")
    RecordClaims.create(other, settings)
    claims = RecordClaims.load(other, replace(settings, start_note=""))
    assert claims.as_dict()["not_covered"][-1] == note


def test_an_edited_ledger_is_no_ledger(quick):
    first = run_of({**quick, **TARGET})
    path = first.directory.path / "privacy.json"
    path.write_text(path.read_text().replace('"num_rounds": 3', '"num_rounds": 2'))

    content = privacy_of(run_of(started(quick, first)))

    assert "is no ledger that could be checked" in content["not_covered"][-1]


def test_what_a_copy_of_the_run_before_released_counts_too(quick):
    first = run_of(
        {**quick, "privacy.target-epsilon": 0.0, "privacy.noise-multiplier": 2.0}
    )
    name = privacy_of(first)["run"]
    released = first.directory.path.parents[1] / "released" / f"{name}.json"
    released.write_text('{"rounds": [1, 2, 3, 4]}')

    second = federation(started({**quick, "privacy.target-epsilon": 50.0}, first))

    assert privacy_of(second)["earlier_mu_squared"] == 4 / 2**2
    released.write_text("damaged")
    third = federation(started(quick, first))
    assert "is no ledger that could be checked" in privacy_of(third)["not_covered"][-1]


def test_a_resumed_run_still_counts_the_runs_before(quick):
    first = run_of({**quick, **TARGET})
    given = started({**quick, "privacy.target-epsilon": 8.0}, first)
    cut = cut_in_round(given, 2)
    (first.directory.path / "peft_final/adapter_model.safetensors").unlink()

    run = resumed(str(cut.directory.path), first_node=300)
    run.run()

    assert privacy_of(run)["epsilon"] == pytest.approx(8, rel=1e-6)


def test_an_adapter_that_does_not_fit_ends_the_start(quick):
    first = run_of({**quick, **NO_PRIVACY})

    with pytest.raises(AdapterError, match="set adapter.rank"):
        federation(started(quick, first, **{"adapter.rank": 2}))


def test_settings_that_mean_nothing_are_errors():
    with pytest.raises(ConfigError, match="start-is-public: needs adapter.start-from"):
        parse_run_config({"adapter.start-is-public": True})
    with pytest.raises(ConfigError, match="must be that of adapter.start-from's"):
        parse_run_config({"adapter.start-from": "a", "adapter.kind": "auto"})
