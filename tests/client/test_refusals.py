"""A client that refused a few requests of a run gives one answer to all others."""

import pytest

from fedllm.client.refusals import MOST, Refusals
from fedllm.errors import BudgetError, PrivacyError
from tests.helpers.client_replies import NODE, RECORD, code_of, epsilon_of

LATE = {**RECORD, "strategy.round-timeout": 1e-6}


def test_after_a_few_refusals_every_request_gets_the_same_code(answer):
    codes = [code_of(answer(LATE)) for _ in range(MOST)]

    assert codes == ["time-limit"] * MOST
    assert code_of(answer(LATE)) == "budget-spent"
    assert code_of(answer(RECORD)) == "budget-spent"
    assert code_of(answer({**RECORD, "train.batch-size": 9})) == "budget-spent"
    assert code_of(answer(RECORD, message_type="evaluate")) == "budget-spent"


def test_rounds_that_are_paid_for_do_not_count(answer):
    for server_round in range(1, 4):
        assert epsilon_of(answer(RECORD, server_round=server_round)) > 0

    assert [code_of(answer(LATE)) for _ in range(MOST)] == ["time-limit"] * MOST


def test_another_client_of_the_machine_is_not_silenced(answer):
    for _ in range(MOST + 1):
        answer(LATE)

    assert epsilon_of(answer(RECORD, {**NODE, "partition-id": 1})) > 0


def test_other_units_are_not_counted(answer):
    late = {"strategy.round-timeout": 1e-6}

    assert [code_of(answer(late)) for _ in range(MOST + 1)][-1] == "time-limit"


def test_a_request_that_kills_the_process_is_counted(tmp_path):
    for _ in range(MOST):
        Refusals(tmp_path, 1, 0).begin()

    with pytest.raises(BudgetError, match="takes no further part"):
        Refusals(tmp_path, 1, 0).begin()
    Refusals(tmp_path, 2, 0).begin()


def test_a_count_that_cannot_be_written_lets_nothing_leave(tmp_path):
    (tmp_path / "file").write_text("")

    with pytest.raises(PrivacyError, match="nothing is released"):
        Refusals(tmp_path / "file", 1, 0).begin()
