"""Which way pays: what was measured near what was asked, and nothing else."""

import math

import pytest

from fedllm.config import DataConfig
from fedllm.data.rows import load_rows
from fedllm.planning.measured_ways import (
    ALONE,
    CLIENT,
    FEDERATED,
    JOINT,
    NO_PRIVACY,
    THEN_PERSONAL,
    TRAINING_ROWS,
    changes,
    measured_ways,
    outlooks,
)
from tests.helpers.ways import KNOWN


def losses(*asked):
    return {one.way: one.loss for one in outlooks(*asked, KNOWN)}


def test_the_best_comes_first_and_what_was_not_measured_last():
    found = outlooks(20, 243, 8.0, KNOWN)

    assert [one.way for one in found] == [
        JOINT + THEN_PERSONAL,
        JOINT,
        ALONE,
        CLIENT,
        *(name for name in FEDERATED if name not in (JOINT, CLIENT)),
    ]
    assert [one.loss for one in found] == [2.3, 2.35, 2.45, 2.75, None, None]


def test_a_smaller_epsilon_takes_nothing_that_spends_more():
    found = losses(20, 243, 2.0)

    assert found[JOINT] == 2.42
    assert found[CLIENT] is None and JOINT + THEN_PERSONAL not in found
    assert losses(20, 243, 1.9)[JOINT] is None
    assert losses(20, 243, 7.99)[JOINT] == 2.35


@pytest.mark.parametrize("asked", [(30, 243, 8.0), (20, 400, 8.0)])
def test_other_numbers_of_clients_or_rows_are_not_measured(asked):
    found = losses(*asked)

    assert found[JOINT] is None and found[CLIENT] is None


def test_a_lone_client_s_loss_is_on_the_line_between_two_measured_numbers_of_rows():
    between = math.sqrt(16 * 48)
    (alone,) = (one for one in outlooks(9, between, 8.0, KNOWN) if one.way == ALONE)

    loss, error = alone.interpolated
    assert loss == pytest.approx(2.75)
    # 48 rows on the line between 16 and 243.
    share = math.log(48 / 16) / math.log(243 / 16)
    assert error == pytest.approx(abs(2.9 - share * 0.45 - 2.6))
    assert losses(9, 10, 8.0)[ALONE] is None and losses(9, 400, 8.0)[ALONE] is None
    two = [one for one in KNOWN if one.way == ALONE][:2]
    assert outlooks(9, 100, 8.0, two)[0].loss is None


def test_what_would_change_the_answer_is_where_joining_paid():
    found = changes(20, 243, 2.0, KNOWN)

    rounded = [(round(loss, 2), round(alone, 2)) for _, loss, alone in found]
    assert rounded[0] == (2.3, 2.45)
    assert sorted(rounded[1:]) == [(2.35, 2.45), (2.5, 2.6)]
    assert all(loss < alone for _, loss, alone in found)
    assert not any("at epsilon 2" in what for what, _, _ in found)


def test_the_package_s_figures_are_of_known_ways_and_name_their_command():
    names = {ALONE, *FEDERATED, *(name + THEN_PERSONAL for name in FEDERATED)}

    for one in measured_ways():
        assert one.way in names and one.command
        assert (one.epsilon is None) == (
            one.way.removesuffix(THEN_PERSONAL) in (ALONE, NO_PRIVACY)
        )
        assert one.clients * one.rows == pytest.approx(TRAINING_ROWS, rel=0.01)
    assert len(load_rows(DataConfig())) == TRAINING_ROWS
