"""A node's own limits, which no run can loosen."""

import pytest

from fedllm.client.node_config import (
    KEYS,
    NodeConfig,
    check_node_limits,
    log_number,
    parse_node_config,
)
from fedllm.config import RunConfig, parse_run_config
from fedllm.errors import ConfigError
from fedllm.node.delivered_app import ANY, CHOICE, INSTALLED
from fedllm.wire.messages import ARRAYS
from tests.helpers.client_replies import JOINT, NODE, RECORD, WITHOUT_DP, code_of


def node_of(**limits: object) -> NodeConfig:
    """A node with these limits, by the keys that its owner types."""
    typed = {key.replace("_", "-"): value for key, value in limits.items()}
    return parse_node_config({**NODE, **typed})


@pytest.mark.parametrize(
    ("limit", "unit"), [("client", "record"), ("record", "client"), ("record", "none")]
)
def test_a_node_that_demands_another_unit_refuses(limit, unit):
    promise = {} if unit != "none" else {"privacy.target-epsilon": 0.0}
    config = parse_run_config({"privacy.unit": unit, **promise})

    with pytest.raises(ConfigError, match=f"demands '{limit}'"):
        check_node_limits(node_of(privacy_unit=limit), config)


@pytest.mark.parametrize("unit", ["client", "record"])
def test_a_limit_cannot_be_passed_by_way_of_a_large_delta(unit):
    config = parse_run_config({"privacy.unit": unit, "privacy.delta": 1e-3})

    with pytest.raises(ConfigError, match="max-epsilon is meant at 1e-05 or less"):
        check_node_limits(node_of(privacy_unit=unit, max_epsilon=8.0), config)
    with pytest.raises(ConfigError, match="max-epsilon is meant at 1e-05 or less"):
        check_node_limits(node_of(privacy_unit=unit), config)
    limits = node_of(privacy_unit=unit, max_epsilon=8.0, delta=0.95)
    check_node_limits(limits, config)


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


def test_a_node_takes_no_base_model_but_the_one_that_it_names():
    config = parse_run_config({"model.name": "other/model"})

    with pytest.raises(ConfigError, match="model.name: this node demands 'known'"):
        check_node_limits(node_of(model_name="known"), config)
    check_node_limits(node_of(model_name="other/model"), config)


def test_a_limit_without_a_unit_is_one_of_client_level():
    config = parse_run_config({"privacy.unit": "record"})

    with pytest.raises(ConfigError, match="its privacy-unit is not set"):
        check_node_limits(node_of(max_epsilon=8.0), config)
    with pytest.raises(ConfigError, match="privacy.delta"):
        check_node_limits(node_of(privacy_unit="record", delta=1e-6), config)


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


def test_a_missed_limit_reaches_the_server_as_a_code(answer):
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
        ({"privacy-unit": "client"}, FIXED_NOISE, "privacy.target-epsilon"),
        (
            {"privacy-unit": "client"},
            {"privacy.target-epsilon": 10.1},
            "privacy.target-epsilon",
        ),
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
        ({"model-name": "m"}, {"model.name": "m"}, None),
        ({"model-name": "m"}, {}, "model.name"),
        ({"privacy-unit": "client"}, {"model.name": "m"}, None),
        ({"privacy-unit": "record"}, RECORD, None),
        ({"privacy-unit": "record"}, {**RECORD, "model.name": "m"}, "model.name"),
        (
            {"privacy-unit": "record", "model-name": "m"},
            {**RECORD, "model.name": "m"},
            None,
        ),
    ],
)
def test_no_run_can_loosen_a_nodes_limits(node, run, refused):
    config, limits = parse_run_config(run), parse_node_config({**NODE, **node})

    if refused is None:
        check_node_limits(limits, config)
    else:
        with pytest.raises(ConfigError, match=f"{refused}.*this node demands"):
            check_node_limits(limits, config)


def test_a_node_without_limits_takes_any_run():
    check_node_limits(node_of(), RunConfig())


def test_a_node_with_a_limit_takes_joint_noise_only_if_its_owner_wrote_so():
    config = parse_run_config(JOINT)

    check_node_limits(node_of(), config)
    check_node_limits(node_of(privacy_unit="record", privacy_noise="joint"), config)
    for limits in (
        {"privacy_unit": "record"},
        {"privacy_unit": "record", "privacy_noise": "local"},
        {"model_name": config.model.name},
    ):
        with pytest.raises(ConfigError, match="this node adds its noise itself"):
            check_node_limits(node_of(**limits), config)


def test_a_node_that_allows_joint_noise_takes_its_own_noise_too():
    node = node_of(privacy_unit="record", privacy_noise="joint")

    check_node_limits(node, parse_run_config(RECORD))


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


PERSONS = {
    "data_path": "rows.jsonl",
    "privacy_unit": "record",
    "person_column": "patient",
    "declared_persons": 40,
}


def test_what_a_person_is_is_the_owners_word_and_no_runs():
    """Another column would break persons up, or put several in one record."""
    by_patient = {"privacy.unit": "record", "data.person-column": "patient"}
    limits = {"privacy_unit": "record", "data_path": "rows.jsonl"}
    for node, run in (
        (PERSONS, {"privacy.unit": "record"}),
        (PERSONS, {"privacy.unit": "record", "data.person-column": "diagnosis"}),
        (limits, by_patient),
        ({"data_path": "rows.jsonl"}, by_patient),
        ({"model_name": "smollm2-135m-instruct"}, by_patient),
    ):
        with pytest.raises(ConfigError, match="data.person-column: this node demands"):
            check_node_limits(node_of(**node), parse_run_config(run))

    check_node_limits(node_of(**PERSONS), parse_run_config(by_patient))
    # Behind a virtual client nobody stands.
    check_node_limits(node_of(), parse_run_config(by_patient))


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


def test_a_runs_plugin_is_the_one_that_the_owner_named(monkeypatch):
    run = parse_run_config({"train.plugin": "ours.steps:make"})

    monkeypatch.setenv(CHOICE, INSTALLED)
    with pytest.raises(
        ConfigError, match="train.plugin: this node's owner allows none"
    ):
        check_node_limits(node_of(), run)
    with pytest.raises(ConfigError, match="allows 'ours.steps:other'"):
        check_node_limits(node_of(train_plugin="ours.steps:other"), run)
    check_node_limits(node_of(train_plugin="ours.steps:make"), run)
    check_node_limits(node_of(train_plugin="ours.steps:make"), parse_run_config({}))
    # A server that chooses the whole app has any function.
    monkeypatch.setenv(CHOICE, ANY)
    check_node_limits(node_of(), run)
