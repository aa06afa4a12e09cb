"""The audit's person: bounded by one clip, and a client without that clip is convicted."""

import numpy as np

from fedllm.auditing.person_checks import NUMBERS_OF_ROWS, check_persons
from fedllm.training import dp_sgd, person_gradients


def test_the_clients_own_code_passes():
    found = check_persons()

    assert found.passed
    assert tuple(found.moved) == NUMBERS_OF_ROWS
    assert min(found.moved.values()) > 0.99


def test_a_client_that_clips_rows_and_not_persons_is_convicted(monkeypatch):
    def rows(batch):
        return [row for person in batch for row in person], []

    monkeypatch.setattr(dp_sgd, "by_number_of_rows", rows)

    found = check_persons()

    assert not found.passed
    assert found.moved[1] <= 1 < 1.99 < found.moved[2] < found.moved[20]


def test_a_client_that_leaves_persons_out_does_not_pass(monkeypatch):
    monkeypatch.setattr(
        dp_sgd, "person_gradient", lambda per_example, rows: np.full(1, np.nan)
    )

    assert not check_persons().passed


def test_a_person_with_an_unusable_row_adds_the_others():
    record = ({"input_ids": [1], "labels": [1]},) * 2

    assert person_gradients.by_number_of_rows([record]) == ([], [record])
