"""What each arm of a comparison trains, and on which clients."""

import pytest

from fedllm.commands.comparison_arms import (
    arm_names,
    centralised,
    make_arm,
    without_privacy,
)
from fedllm.config import RunConfig, flat, parse_run_config

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

    assert private == [
        *("base", "federated", "federated-dp", "centralised"),
        *("alone-0", "alone-1", "alone-2"),
    ]
    assert set(private) - set(public) == {"federated-dp"}
    assert arm_names(RunConfig(), 10, alone=2)[-2:] == ["alone-0", "alone-5"]


@pytest.mark.parametrize("sampled", [{}, SAMPLED])
def test_the_centralised_arm_sees_as_many_examples_as_all_sampled_clients(sampled):
    steps = parse_run_config({**sampled, "train.local-steps": 2})
    epochs = parse_run_config(
        {**sampled, "train.local-steps": 0, "train.local-epochs": 3.0}
    )
    share = 0.5 if sampled else 1.0

    assert centralised(steps, 20).train.local_steps == 2 * 20 * share
    assert centralised(epochs, 20).train.local_epochs == 3.0 * share


@pytest.mark.parametrize("changes", [{}, SAMPLED, EVALUATED])
def test_every_arms_clients_accept_their_run_config(changes):
    config = parse_run_config({**changes, "adapter.kind": "lora"})

    for name in arm_names(config, 4)[1:]:
        arm = make_arm(name, config, 4)
        assert parse_run_config(flat(arm.config)) == arm.config
        alone = name == "centralised" or name.startswith("alone")
        assert len(arm.nodes) == (1 if alone else 4)
        if alone:
            assert arm.config.strategy.num_sampled(1) == 1


def test_a_client_alone_keeps_the_partition_that_it_has_among_all():
    arm = make_arm("alone-2", RunConfig(), 4)

    assert arm.nodes == [{"partition-id": 2, "num-partitions": 4}]


def test_the_server_of_an_arm_differs_in_nothing_that_changes_a_loss():
    config = parse_run_config({**EVALUATED, "strategy.round-timeout": 7.0})
    arm = make_arm("federated", config, 4)
    own, clients = flat(arm.server_config), flat(arm.config)

    assert {key: own[key] for key in own if own[key] != clients[key]} == {
        "strategy.fraction-evaluate": 0.0,
        "strategy.round-timeout": 28.0,
        "privacy.noise-probe": False,
        "output.save-every": config.num_server_rounds,
    }
