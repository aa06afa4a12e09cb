"""The node config: a closed list of keys, each with values that mean something."""

import pytest

from fedllm.client.node_config import KEYS, log_number, parse_node_config
from fedllm.errors import ConfigError
from tests.helpers.client_replies import NODE, code_of
from tests.helpers.node_configs import PERSONS, node_of


@pytest.mark.parametrize(
    "key", ["max_epsilon", "privacy.unit", "epsilon", "Delta", "site-name"]
)
def test_a_key_that_nothing_reads_is_refused_by_its_name(key):
    with pytest.raises(ConfigError, match=f"node config: {key}: unknown") as error:
        parse_node_config({**NODE, key: "client"})
    assert all(known in str(error.value) for known in KEYS)


def test_all_unknown_keys_are_named_at_once():
    with pytest.raises(ConfigError, match="node config: site, max_epsilon: unknown"):
        parse_node_config({"site": "north", **NODE, "max_epsilon": 8.0})


def test_what_flower_sets_in_a_simulation_is_all_known():
    from flwr.common.constant import NUM_PARTITIONS_KEY, PARTITION_ID_KEY

    assert parse_node_config({PARTITION_ID_KEY: 1, NUM_PARTITIONS_KEY: 2}).is_simulated


@pytest.mark.parametrize(
    "own",
    [
        {"data-path": "rows.jsonl"},
        {"privacy-unit": "record"},
        {"max-epsilon": 0},
        {"delta": 0.0},
        {"model-name": "known"},
    ],
)
def test_a_node_with_a_file_or_a_limit_is_no_simulation(own):
    assert not parse_node_config({**NODE, **own}).is_simulated


@pytest.mark.parametrize(
    "node",
    [
        {},
        {"partition-id": 0},
        {"num-partitions": 2},
        {"partition-id": "x", "num-partitions": 2},
        {"partition-id": 2, "num-partitions": 2},
        {"partition-id": -1, "num-partitions": 2},
        {**NODE, "max-epsilon": "much"},
        {**NODE, "delta": "small"},
    ],
)
def test_a_node_config_that_cannot_be_used_is_a_bad_config(answer, node):
    assert code_of(answer(node=node)) == "bad-config"


def test_the_partition_of_a_nodes_own_file_comes_from_its_path():
    def parsed(path: str, **more: int) -> tuple[int, int]:
        node = parse_node_config({"data-path": path, **more})
        assert node.data_path == path
        return node.partition_id, node.num_partitions

    one = parsed("/data/a.jsonl")

    assert one == parsed("/data/a.jsonl")
    assert one != parsed("/data/b.jsonl")
    assert one[1] == 1
    own = {"partition-id": 3, "num-partitions": 9}
    assert parsed("/data/a.jsonl", **own) == (3, 1)


@pytest.mark.parametrize(
    ("node", "number"),
    [
        ({**NODE, "partition-id": 3, "max-epsilon": "much"}, 3),
        ({**NODE, "partition-id": 3, "unknown": 1}, 3),
        ({"partition-id": "x", "num-partitions": 2}, 0),
        ({}, 0),
    ],
)
def test_the_log_of_a_wrong_node_config_is_its_partitions_if_that_can_be_read(
    node, number
):
    with pytest.raises(ConfigError):
        parse_node_config(node)
    assert log_number(node) == number


@pytest.mark.parametrize(
    ("limits", "what"),
    [
        ({"privacy_unit": "record", "privacy_noise": "both"}, "'local' or 'joint'"),
        ({"privacy_noise": "joint"}, "is for privacy-unit='record'"),
        ({"privacy_unit": "client", "privacy_noise": "joint"}, "is for privacy-unit"),
        ({"declared_rows": 0}, "a whole number of rows"),
        ({"declared_rows": 2.5}, "a whole number of rows"),
        ({"declared_rows": "many"}, "must be a number"),
        ({"declared_rows": 10**12}, "a whole number of rows"),
    ],
)
def test_a_limit_that_means_nothing_is_an_error(limits, what):
    with pytest.raises(ConfigError, match=what):
        node_of(**limits)


def test_a_period_needs_a_budget_of_client_level():
    monthly = {"max_epsilon": 8.0, "budget_period": 30}
    assert node_of(**monthly).budget_period == 30.0
    assert node_of(privacy_unit="client", budget_period=30).max_epsilon == 10.0
    assert node_of(max_epsilon=8.0).budget_period is None
    for limits, cause in (
        ({"budget_period": 30}, "needs max-epsilon"),
        ({**monthly, "privacy_unit": "record"}, "needs max-epsilon under client level"),
        ({**monthly, "budget_period": 0}, "must be above 0"),
        ({**monthly, "budget_period": "a month"}, "must be a number"),
    ):
        with pytest.raises(ConfigError, match=f"budget-period: {cause}"):
            node_of(**limits)


def test_runs_are_composed_at_the_nodes_delta_and_never_at_one_that_bounds_nothing():
    assert node_of(max_epsilon=8.0).counted_delta == 1e-5
    assert node_of(delta=1e-7).counted_delta == 1e-7
    assert node_of(delta=0.95).counted_delta == 1e-3


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"declared_persons": None}, "person-column: needs declared-persons"),
        ({"data_path": None}, "person-column: needs data-path"),
        ({"person_column": None}, "declared-persons: needs person-column"),
        ({"person_column": ""}, "person-column: must name a column"),
        ({"person_column": 3}, "person-column: must name a column"),
        ({"privacy_unit": "client"}, "person-column: is for privacy-unit='record'"),
        ({"declared_persons": 2.5}, "declared-persons: must be a whole number of per"),
        ({"declared_persons": 0}, "declared-persons: must be a whole number of per"),
    ],
)
def test_a_person_column_needs_all_that_makes_it_a_promise(changes, words):
    typed = {k: v for k, v in {**PERSONS, **changes}.items() if v is not None}

    with pytest.raises(ConfigError, match=words):
        node_of(**typed)


PIN_A, PIN_B = "A" * 43, "B" * 42 + "A"


TRUSTEE_ALONE = {"trustee-name": "a", "trustee-key": "/key"}


def test_a_trustee_without_data_is_no_client():
    node = parse_node_config(TRUSTEE_ALONE)

    assert not node.has_data and not node.is_simulated
    assert log_number(TRUSTEE_ALONE) == node.partition_id > 0
    assert parse_node_config({**TRUSTEE_ALONE, "data-path": "rows.jsonl"}).has_data


@pytest.mark.parametrize(
    "more", [{"declared-rows": 9}, {"partition-id": 0}, {"person-column": "who"}]
)
def test_a_trustee_that_says_something_of_data_has_forgotten_where_it_is(more):
    with pytest.raises(ConfigError, match="needs data-path"):
        parse_node_config({**TRUSTEE_ALONE, **more})


def test_a_node_without_data_that_is_no_trustee_is_refused():
    for values in ({}, {"least-trustees": 2}):
        with pytest.raises(ConfigError, match="needs data-path"):
            parse_node_config(values)


def test_an_owners_trustees_are_names_and_pins():
    node = node_of(trusted_trustees=f"a:{PIN_A}, b.c:{PIN_B}")

    assert dict(node.trusted_trustees) == {"a": PIN_A, "b.c": PIN_B}
    assert not node.is_simulated


@pytest.mark.parametrize(
    "text",
    [
        *("", "a", "a:", "a:short", f":{PIN_A}", f"A:{PIN_A}"),
        f"a:{PIN_A},a:{PIN_B}",
        # One key under two names would count as two trustees.
        f"a:{PIN_A},b:{PIN_A}",
    ],
)
def test_what_pins_no_trustee_is_refused(text):
    with pytest.raises(ConfigError, match="trusted-trustees"):
        node_of(trusted_trustees=text)


@pytest.mark.parametrize(
    ("limits", "said"),
    [
        ({"trustee_name": "a"}, "has both"),
        ({"trustee_key": "/key"}, "has both"),
        ({"trustee_name": "A", "trustee_key": "/key"}, "small letters"),
        ({"least_trustees": 0}, "at least 1"),
        ({"least_trustees": 1.5}, "whole number"),
        ({"colluding_trustees": -1}, "from 0 to 9"),
        ({"colluding_trustees": 10}, "from 0 to 9"),
        ({"colluding_trustees": "x"}, "must be a number"),
    ],
)
def test_what_is_no_trustee_and_no_floor_is_refused(limits, said):
    with pytest.raises(ConfigError, match=said):
        node_of(**limits)


def test_a_node_with_a_floor_of_trustees_is_no_simulation():
    for limits in ({"least_trustees": 2}, {"colluding_trustees": 0}):
        assert node_of(**limits).has_limits
    named = node_of(trustee_name="a", trustee_key="/key")
    assert not named.is_simulated


@pytest.mark.parametrize("rank", [0, -2, 1.5, "all"])
def test_a_bound_of_rank_is_a_number_of_columns(rank):
    with pytest.raises(ConfigError, match="adapter-rank: must be a"):
        node_of(adapter_rank=rank)
    assert node_of(adapter_rank=4).adapter_rank == 4
    # What a machine can do is no word of an owner on what leaves it.
    assert node_of(adapter_rank=4).is_simulated


@pytest.mark.parametrize(
    "typed",
    [
        *({"max_seconds": value} for value in (0, -1.0, "long")),
        *({"max_memory": value} for value in (0, -1.0, "much")),
        *({"batch_size": value} for value in (0, 1.5)),
    ],
)
def test_a_limit_of_the_machine_that_leaves_nothing_is_refused(typed):
    with pytest.raises(ConfigError, match="-(seconds|memory|size): must be"):
        node_of(**typed)
