"""The clients of a run: enough of them, and in their places."""

import pytest

from fedllm.errors import FederationError
from fedllm.server.population import present_population, replace_departed
from tests.helpers.federations import (
    NO_PRIVACY,
    cut_in_round,
    federation,
    learner,
    lines_of,
    partitions,
    resumed,
    start,
)


def test_a_population_keeps_its_places_and_its_size():
    assert replace_departed([3, 1, 2], [1, 2, 3]) == [3, 1, 2]
    assert replace_departed([3, 1, 2], [9, 2, 3]) == [3, 9, 2]
    assert replace_departed([3, 1, 2], [2, 3]) == [3, 1, 2]
    assert replace_departed([3, 1, 2], [7, 8, 9, 10]) == [7, 8, 9]


def test_too_few_clients_are_named_with_the_remedy(settings):
    with pytest.raises(FederationError, match=r"num-supernodes=20"):
        start({**settings, "strategy.num-clients": 20})


def test_no_more_clients_than_were_asked_for_take_part(settings):
    federation, _ = start({**settings, "strategy.num-clients": 3}, nodes=partitions(5))

    assert federation.population == sorted(federation.grid.get_node_ids())[:3]


def test_a_population_of_another_size_is_refused_and_other_ids_are_not(quick):
    cut_in_round(quick, 2)
    with pytest.raises(FederationError, match="3 clients are asked for, but 2"):
        resumed(num_clients=2)

    # A fourth client takes nobody's place.
    run = resumed(num_clients=4, first_node=101)
    assert run.population == [103, 101, 102]


def test_without_dp_who_joins_or_leaves_takes_part_from_the_next_round():
    assert present_population([3, 1, 2], [1, 2, 3], 0) == [3, 1, 2]
    assert present_population([3, 1, 2], [2, 3], 0) == [3, 2]
    assert present_population([3, 1, 2], [9, 2, 3], 0) == [3, 9, 2]
    assert present_population([3, 1, 2], [9, 1, 2, 3, 8], 0) == [3, 1, 2, 8, 9]
    # No more than were asked for.
    assert present_population([3, 1, 2], [9, 1, 2, 3], 3) == [3, 1, 2]
    # All at once are gone for a moment only: the SuperLink was started again.
    assert present_population([3, 1, 2], [], 0) == [3, 1, 2]


@pytest.mark.parametrize("private", [False, True])
def test_a_run_takes_up_a_node_that_joins_only_without_dp(quick, private):
    def answer(message, where):
        run.grid.contexts[555] = where
        return learner(message, where)

    run = federation(quick if private else {**quick, **NO_PRIVACY}, answer)
    run.run()

    asked = [line["clients_asked"] for line in lines_of(run)[1:]]
    assert asked == ([3, 3, 3] if private else [3, 4, 4])
