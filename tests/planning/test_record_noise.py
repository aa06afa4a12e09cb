"""The noise of a client of records."""

import pytest
from dp_accounting import (
    GaussianDpEvent,
    NeighboringRelation,
    PoissonSampledDpEvent,
    SelfComposedDpEvent,
)
from dp_accounting.pld import PLDAccountant

from fedllm.commands import plan
from tests.helpers.plans import plan_json, plan_text


def test_a_client_of_records_is_planned_for_by_dp_accountings_numbers(capsys):
    typed = ("--run-config", "configs/record-level.toml", "--records", "486")
    found = plan_json(capsys, *typed)

    accountant = PLDAccountant(NeighboringRelation.ADD_OR_REMOVE_ONE)
    noise = GaussianDpEvent(found["noise_multiplier"])
    event = PoissonSampledDpEvent(32 / 486, noise)
    accountant.compose(SelfComposedDpEvent(event, 5 * 2))
    assert found["epsilon"] == pytest.approx(accountant.get_epsilon(1e-5), rel=1e-3)
    assert 7.9 < found["epsilon"] <= 8.0
    assert "noise multiplier 0.5" in plan_text(capsys, *typed)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((), "--records: is missing"),
        (("--records", "31"), "this client has 31"),
        (("--records", "486", "--probe"), "--probe, --plot: are for"),
    ],
)
def test_a_plan_for_records_that_cannot_be_made_is_one_line(capsys, flags, message):
    with pytest.raises(SystemExit) as caught:
        plan.main(["--run-config", "configs/record-level.toml", *flags])

    assert message in str(caught.value) and "\n" not in str(caught.value)
