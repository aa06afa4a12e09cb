"""A node's own limits, which no run can loosen."""

import pytest

from fedllm.adapters.kinds import KINDS
from fedllm.client.node_config import parse_node_config
from fedllm.client.node_limits import check_node_limits, rank_line, trained_rank
from fedllm.config import AdapterConfig, RunConfig
from fedllm.config_parsing import parse_run_config
from fedllm.errors import ConfigError
from fedllm.node.delivered_app import ANY, CHOICE, INSTALLED
from fedllm.wire.messages import ARRAYS
from tests.helpers.client_replies import JOINT, NODE, RECORD, WITHOUT_DP, code_of
from tests.helpers.node_configs import PERSONS, node_of


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


def adapter(kind: str = "ffa-lora", rank: int = 8) -> AdapterConfig:
    return AdapterConfig(kind=kind, rank=rank)


def test_a_node_trains_its_own_rank_of_a_run_of_a_larger_one():
    assert trained_rank(node_of(adapter_rank=2), adapter()) == 2
    assert "first 2 of the run's 8" in rank_line(node_of(adapter_rank=2), adapter())
    for most in (8, 64):
        node = node_of(adapter_rank=most)
        assert trained_rank(node, adapter()) is None
        assert f"adapter-rank {most} is not below" in rank_line(node, adapter())
    assert trained_rank(node_of(), adapter()) is None
    assert not rank_line(node_of(), adapter())


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "ffa-lora"])
def test_a_kind_without_nested_ranks_is_refused_only_above_the_nodes_rank(kind):
    assert trained_rank(node_of(adapter_rank=8), adapter(kind)) is None
    if kind == "ia3":
        assert trained_rank(node_of(adapter_rank=1), adapter(kind)) is None
        return
    with pytest.raises(ConfigError, match=f"trains 7 at most .got 8., and .*'{kind}'"):
        trained_rank(node_of(adapter_rank=7), adapter(kind))


def test_a_trustee_without_data_needs_no_pins_and_no_persons(monkeypatch):
    # It sends no update, so it has nobody to trust.
    node = parse_node_config({"trustee-name": "a", "trustee-key": "/key"})
    run = {
        "privacy.trust": "trustees",
        "privacy.trustees": "a,b",
        "privacy.unit": "record",
        "privacy.noise": "joint",
        "data.person-column": "who",
        "train.local-steps": 1,
        "adapter.kind": "lora-core",
    }
    config = parse_run_config(run)
    monkeypatch.setenv(CHOICE, INSTALLED)

    check_node_limits(node, config)

    monkeypatch.setenv(CHOICE, "any")
    with pytest.raises(ConfigError, match="an app that this node's owner chose"):
        check_node_limits(node, config)
