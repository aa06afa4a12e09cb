"""What each arm of a comparison trains, and on which clients."""

import pytest

from fedllm.commands.comparison_arms import (
    FEDERATIONS,
    arm_names,
    kind_of,
    lone_client,
    make_arm,
    start_of,
    without_privacy,
)
from fedllm.config import RunConfig, flat
from fedllm.config_parsing import parse_run_config

SAMPLED = {"strategy.sampling": "poisson", "strategy.fraction-train": 0.5}
EVALUATED = {
    "privacy.unit": "none",
    "privacy.target-epsilon": 0.0,
    "data.held-out-fraction": 0.2,
    "strategy.fraction-evaluate": 1.0,
}


def test_the_arms_are_those_that_the_privacy_unit_has():
    private = arm_names(RunConfig(), 3)
    public = arm_names(without_privacy(RunConfig()), 3)
    personal = [
        f"personal-{federation}-{i}" for federation in FEDERATIONS for i in range(3)
    ]

    assert private == [
        *("base", "federated", "federated-dp", "centralised"),
        *("alone-0", "alone-1", "alone-2"),
        *personal,
    ]
    assert set(private) - set(public) == {"federated-dp", *personal[3:]}
    few = arm_names(without_privacy(RunConfig()), 10, alone=2)
    assert few[3:] == [
        *("alone-0", "alone-5", "personal-federated-0", "personal-federated-5"),
    ]


def test_an_arm_has_a_kind_and_a_start():
    names = arm_names(RunConfig(), 12, alone=1)

    assert {name: (kind_of(name), start_of(name)) for name in names} == {
        "base": ("base", "base"),
        "federated": ("federated", "base"),
        "federated-dp": ("federated-dp", "base"),
        "centralised": ("centralised", "base"),
        "alone-0": ("alone", "base"),
        "personal-federated-0": ("personal", "federated"),
        "personal-federated-dp-0": ("personal", "federated-dp"),
    }


@pytest.mark.parametrize("changes", [{}, SAMPLED, EVALUATED])
def test_every_arms_clients_accept_their_run_config(changes):
    config = parse_run_config({**changes, "adapter.kind": "lora"})

    for name in FEDERATIONS[: 1 if changes.get("privacy.unit") == "none" else 2]:
        arm = make_arm(name, config, 4)
        assert parse_run_config(flat(arm.config)) == arm.config
        assert len(arm.nodes) == 4


@pytest.mark.parametrize("name", ["alone-2", "personal-federated-dp-2"])
def test_a_single_client_has_the_rows_that_it_has_among_all(name):
    config = parse_run_config({"data.partition": "dirichlet"})

    own, node = lone_client(name, config, 4)

    assert node == {"partition-id": 2, "num-partitions": 4}
    assert own.data == config.data and own.privacy.unit == "none"


def test_all_rows_in_one_place_are_one_partition_of_any_data():
    config = parse_run_config({"data.partition": "natural"})

    own, node = lone_client("centralised", config, 4)

    assert node == {"partition-id": 0, "num-partitions": 1}
    assert own.data.partition == "iid"


def test_the_server_of_an_arm_differs_in_nothing_that_changes_a_loss():
    config = parse_run_config(
        {**EVALUATED, "strategy.round-timeout": 7.0, "num-server-rounds": 3}
    )
    arm = make_arm("federated", config, 4)
    own, clients = flat(arm.server_config), flat(arm.config)

    assert {key: own[key] for key in own if own[key] != clients[key]} == {
        "strategy.fraction-evaluate": 0.0,
        "strategy.round-timeout": 28.0,
        "privacy.noise-probe": False,
        "output.save-every": config.num_server_rounds,
    }


def test_a_federation_s_clients_hold_rows_out_and_its_server_delivers_nothing():
    config = parse_run_config({"personal.epochs": 2.0})

    for name in FEDERATIONS:
        arm = make_arm(name, config, 2)
        assert arm.config.is_personal and not arm.server_config.is_personal
