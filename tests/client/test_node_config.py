"""A node's own limits, which no run can loosen."""

import pytest

from fedllm.client.node_config import check_node_limits, partition_of
from fedllm.config import RunConfig, parse_run_config
from fedllm.errors import ConfigError
from fedllm.wire.messages import ARRAYS
from tests.helpers.client_replies import NODE, WITHOUT_DP, code_of
from tests.helpers.flower_messages import context


@pytest.mark.parametrize(
    ("floor", "unit"), [("client", "record"), ("record", "client"), ("record", "none")]
)
def test_a_node_that_demands_another_unit_refuses(floor, unit):
    promise = {} if unit != "none" else {"privacy.target-epsilon": 0.0}
    config = parse_run_config({"privacy.unit": unit, **promise})

    with pytest.raises(ConfigError, match=f"demands '{floor}'"):
        check_node_limits({"privacy-unit": floor}, config)


@pytest.mark.parametrize("unit", ["client", "record"])
def test_a_limit_cannot_be_passed_by_way_of_a_large_delta(unit):
    config = parse_run_config({"privacy.unit": unit, "privacy.delta": 0.9})

    with pytest.raises(ConfigError, match="max-epsilon is meant at 1e-05 or less"):
        check_node_limits({"privacy-unit": unit, "max-epsilon": 8.0}, config)
    check_node_limits({"privacy-unit": unit}, config)
    check_node_limits({"privacy-unit": unit, "max-epsilon": 8.0, "delta": 0.95}, config)


@pytest.mark.parametrize("key", ["max_epsilon", "privacy.unit", "epsilon", "Delta"])
def test_a_floor_by_another_name_is_refused_and_not_passed_over(key):
    with pytest.raises(ConfigError, match=f"node config: {key}: is no floor"):
        check_node_limits({key: "client"}, RunConfig())
    check_node_limits({"site-name": "north", "num-partitions": 2}, RunConfig())


def test_a_limit_without_a_unit_is_one_of_client_level():
    config = parse_run_config({"privacy.unit": "record"})

    with pytest.raises(ConfigError, match="its privacy-unit is not set"):
        check_node_limits({"max-epsilon": 8.0}, config)
    with pytest.raises(ConfigError, match="privacy.delta"):
        check_node_limits({"privacy-unit": "record", "delta": 1e-6}, config)


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
    one = partition_of(context({}, {"data-path": "/data/a.jsonl"}))

    assert one == partition_of(context({}, {"data-path": "/data/a.jsonl"}))
    assert one != partition_of(context({}, {"data-path": "/data/b.jsonl"}))
    assert one[1] == 1
    own = {"data-path": "/data/a.jsonl", "partition-id": 3, "num-partitions": 9}
    assert partition_of(context({}, own)) == (3, 1)


def test_a_refused_floor_reaches_the_server_as_a_code(answer):
    assert code_of(answer(node={**NODE, "max-epsilon": 1.0})) == "bad-config"
    assert (
        code_of(answer(WITHOUT_DP, {**NODE, "privacy-unit": "client"})) == "bad-config"
    )
    assert ARRAYS in answer(node={**NODE, "max-epsilon": 8.0}).content


FIXED_NOISE = {"privacy.target-epsilon": 0.0, "privacy.noise-multiplier": 1.0}


@pytest.mark.parametrize(
    ("node", "run", "refused"),
    [
        ({"privacy-unit": "client"}, {}, None),
        ({"privacy-unit": "client"}, WITHOUT_DP, "privacy.unit"),
        ({"privacy-unit": "record"}, {}, "privacy.unit"),
        ({"max-epsilon": 8.0}, {}, None),
        ({"max-epsilon": 8}, {}, None),
        ({"max-epsilon": 7.9}, {}, "privacy.target-epsilon"),
        ({"max-epsilon": 8.0}, WITHOUT_DP, "privacy.unit"),
        ({"max-epsilon": 8.0}, FIXED_NOISE, "privacy.target-epsilon"),
        ({"max-epsilon": 8.0}, {**FIXED_NOISE, "privacy.max-epsilon": 5.0}, None),
        (
            {"max-epsilon": 8.0},
            {**FIXED_NOISE, "privacy.max-epsilon": 9.0},
            "privacy.target-epsilon",
        ),
        ({"delta": 1e-5}, {"privacy.delta": 1e-6}, None),
        ({"delta": 1e-5}, {"privacy.delta": 1e-4}, "privacy.delta"),
        ({"delta": 1e-5}, {}, "privacy.delta"),
        ({"delta": 1e-5}, {**WITHOUT_DP, "privacy.delta": 1e-6}, "privacy"),
        ({}, WITHOUT_DP, None),
    ],
)
def test_no_run_can_loosen_a_nodes_floors(node, run, refused):
    config = parse_run_config(run)

    if refused is None:
        check_node_limits(node, config)
    else:
        with pytest.raises(ConfigError, match=f"{refused}.*this node demands"):
            check_node_limits(node, config)


def test_a_node_without_floors_takes_any_run():
    check_node_limits({}, RunConfig())
