"""The clients of a run: enough of them, and in their places."""

import pytest

from fedllm.errors import FederationError
from fedllm.server.population import replace_departed
from tests.helpers.federations import cut_in_round, partitions, resumed, start


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
