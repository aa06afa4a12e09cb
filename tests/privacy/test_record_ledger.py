"""A client's own account of what it has released."""

import json
import os
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import dp_accounting as dp
import pytest
from dp_accounting import pld

from fedllm.errors import BudgetError, ConfigError, PrivacyError
from fedllm.privacy.accounting import (
    gaussian_epsilon,
    record_accountant,
    record_epsilon,
)
from fedllm.privacy.record_ledger import RecordLedger, RecordPlan, make_plan

DELTA = 1e-5
EVENT = (2.0, 0.1, 5)


def by_dp_accounting(*events: tuple[float, float, int]) -> float:
    relation = dp.NeighboringRelation.ADD_OR_REMOVE_ONE
    accountant = pld.PLDAccountant(relation)
    for z, q, count in events:
        step = dp.PoissonSampledDpEvent(q, dp.GaussianDpEvent(z))
        accountant.compose(dp.SelfComposedDpEvent(step, count))
    return float(accountant.get_epsilon(DELTA))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "ledgers/own"


def content_of(folder: Path) -> dict:
    return json.loads((folder / "ledger.json").read_text())


def test_what_is_spent_is_that_of_dp_accounting_alone(folder):
    ledger = RecordLedger(folder)

    first = ledger.spend(EVENT, DELTA, 100.0)
    second = ledger.spend(EVENT, DELTA, 100.0)
    other = ledger.spend((2.6, 0.2, 3), DELTA, 100.0)

    assert first == pytest.approx(by_dp_accounting(EVENT), rel=1e-9)
    assert second == pytest.approx(by_dp_accounting((2.0, 0.1, 10)), rel=1e-9)
    assert other == pytest.approx(
        by_dp_accounting((2.0, 0.1, 10), (2.6, 0.2, 3)), rel=1e-3
    )


def test_the_account_survives_a_restart(folder):
    RecordLedger(folder).spend(EVENT, DELTA, 100.0)

    again = RecordLedger(folder).spend(EVENT, DELTA, 100.0)

    assert again == pytest.approx(by_dp_accounting((2.0, 0.1, 10)), rel=1e-9)
    assert RecordLedger(folder).epsilon(DELTA) == again


def test_a_release_that_would_pass_the_limit_is_rejected_and_not_entered(folder):
    ledger = RecordLedger(folder)
    limit = by_dp_accounting((2.0, 0.1, 10)) + 1e-6
    for _ in range(2):
        ledger.require(EVENT, DELTA, limit)
        ledger.spend(EVENT, DELTA, limit)
    spent = (folder / "ledger.json").read_bytes()

    with pytest.raises(BudgetError, match="privacy.max-epsilon"):
        ledger.require(EVENT, DELTA, limit)
    with pytest.raises(BudgetError, match="in all runs"):
        ledger.spend(EVENT, DELTA, limit)

    assert (folder / "ledger.json").read_bytes() == spent


def test_the_ledger_is_synced_before_spend_returns(folder, monkeypatch):
    ledger = RecordLedger(folder)
    synced = []
    monkeypatch.setattr(
        os,
        "fsync",
        lambda d: synced.append(os.readlink(f"/proc/self/fd/{d}")),
    )

    ledger.spend(EVENT, DELTA, 100.0)

    assert synced == [str(folder / "ledger.tmp"), str(folder)]


def test_a_ledger_that_cannot_be_written_releases_nothing(folder, monkeypatch):
    ledger = RecordLedger(folder)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)

    with pytest.raises(PrivacyError, match="No space left"):
        ledger.spend(EVENT, DELTA, 100.0)


def edit(folder: Path) -> None:
    content = content_of(folder)
    content["content"]["releases"][0][2] = 1
    (folder / "ledger.json").write_text(json.dumps(content))


def truncate(folder: Path) -> None:
    data = (folder / "ledger.json").read_bytes()
    (folder / "ledger.json").write_bytes(data[: len(data) // 2])


def lose(folder: Path) -> None:
    (folder / "ledger.json").unlink()


def lose_key(folder: Path) -> None:
    (folder / "key").unlink()


def swap(folder: Path) -> None:
    other = RecordLedger(folder.with_name("another"))
    other.spend(EVENT, DELTA, 100.0)
    (folder / "ledger.json").write_bytes(
        (folder.with_name("another") / "ledger.json").read_bytes()
    )


def seal_as_number(folder: Path) -> None:
    (folder / "ledger.json").write_text('{"seal": 1, "content": {"format": 2}}')


@pytest.mark.parametrize("harm", [edit, truncate, lose, lose_key, swap, seal_as_number])
def test_a_ledger_that_cannot_be_trusted_is_rejected(folder, harm):
    RecordLedger(folder).spend(EVENT, DELTA, 100.0)
    harm(folder)

    with pytest.raises(PrivacyError, match="cannot be trusted"):
        RecordLedger(folder).spend(EVENT, DELTA, 100.0)


def test_only_the_owner_can_read_it_and_it_has_releases_and_no_row(folder):
    RecordLedger(folder).spend(EVENT, DELTA, 100.0)

    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert {stat.S_IMODE(p.stat().st_mode) for p in folder.iterdir()} == {0o600}
    assert content_of(folder)["content"] == {
        "format": 2,
        "plans": {},
        "releases": [[2.0, 0.1, 5]],
    }


def test_no_release_is_forgotten_where_several_spend_at_a_time(folder):
    def spend(index: int) -> None:
        RecordLedger(folder).spend((5.0, 0.1, 1), DELTA, 100.0)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(spend, range(12)))

    assert content_of(folder)["content"]["releases"] == [[5.0, 0.1, 12]]


def test_a_plan_keeps_the_target_for_all_rounds_together():
    plan = make_plan(486, 64, 3, 4, 8.0, 0.0, 0.0)

    assert plan.sampling_probability == 64 / 486
    assert plan.delta == 1e-5
    spent = by_dp_accounting((plan.noise_multiplier, 64 / 486, 12))
    assert 7.8 < spent <= 8.0
    assert make_plan(486, 64, 3, 4, 0.0, 1.7, 1e-6) == RecordPlan(
        1.7, 64 / 486, 3, 64, 1e-6
    )
    assert make_plan(100_000, 64, 1, 1, 0.0, 1.0, 0.0).delta == 100_000**-1.1


def test_a_run_keeps_its_first_plan(folder):
    first, second = RecordPlan(1.0, 0.1, 2, 8, 1e-5), RecordPlan(0.5, 0.1, 2, 8, 1e-5)
    ledger = RecordLedger(folder)

    assert ledger.plan("run") is None
    assert ledger.remember_plan("run", first) == first
    assert RecordLedger(folder).remember_plan("run", second) == first
    assert RecordLedger(folder).plan("run") == first


def test_epsilon_does_not_depend_on_how_releases_are_grouped():
    parts = [(1.0, 0.1, 2), (2.0, 0.1, 1), (1.0, 0.1, 3)]

    assert record_epsilon(parts, DELTA) == record_epsilon(
        [(2.0, 0.1, 1), (1.0, 0.1, 5)], DELTA
    )
    assert record_epsilon([], DELTA) == 0.0


def test_without_sampling_epsilon_is_that_of_the_gaussian_exactly():
    assert record_epsilon([(2.0, 1.0, 3)], DELTA) == pytest.approx(
        gaussian_epsilon(2.0, 3, DELTA), rel=1e-9
    )


def test_an_epsilon_names_the_accountant_whose_it_is():
    assert record_accountant([(2.0, 1.0, 3)], DELTA) == "exact Gaussian"
    assert record_accountant([(2.0, 0.1, 3)], DELTA) == "PLD (dp-accounting)"
    assert record_accountant([(2.0, 0.1, 3), (3.0, 0.1, 1)], DELTA).startswith("PLD")
    assert record_accountant([(0.2, 1e-4, 3)], DELTA) == "RDP (dp-accounting)"


def test_noise_too_small_for_pld_is_still_bounded():
    spent = record_epsilon([(0.05, 0.01, 2), (0.04, 0.02, 1)], DELTA)

    assert 10 < spent <= gaussian_epsilon((2 / 0.05**2 + 1 / 0.04**2) ** -0.5, 1, DELTA)


def test_a_ledger_of_rows_is_no_bound_for_persons_nor_the_other_way(tmp_path):
    for first, second in (("row", "person"), ("person", "row")):
        folder = tmp_path / first
        # What was planned and never released binds nothing.
        RecordLedger(folder, second).remember_plan("run", RecordPlan(*EVENT, 2, DELTA))
        RecordLedger(folder, first).spend(EVENT, DELTA, 100.0)
        spent = RecordLedger(folder, first).epsilon(DELTA)

        with pytest.raises(ConfigError, match=f"with one {first} as the unit"):
            RecordLedger(folder, second)
        assert RecordLedger(folder, first).epsilon(DELTA) == spent > 0


def test_a_ledger_that_was_opened_before_it_had_a_unit_spends_none_of_another(tmp_path):
    early = RecordLedger(tmp_path / "own", "person")
    RecordLedger(tmp_path / "own", "row").spend(EVENT, DELTA, 100.0)

    with pytest.raises(ConfigError, match="with one row as the unit"):
        early.spend(EVENT, DELTA, 100.0)
    with pytest.raises(ConfigError, match="with one row as the unit"):
        early.remember_plan("run", RecordPlan(*EVENT, 2, DELTA))
