"""What `auto` becomes, on the server and on a client."""

from dataclasses import replace
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedllm.adapters.kinds import KINDS
from fedllm.config import AdapterKind
from fedllm.config_parsing import parse_run_config
from fedllm.planning.adapter_choice import (
    Choice,
    choose_adapter,
    expected_gain,
    with_choice,
)
from fedllm.planning.frontier import Frontier, Measured, load_frontier
from fedllm.privacy.accounting import calibrate
from tests.helpers.adapters import make_config


def row(kind: str, clients: int, epsilon: float | None, loss: float) -> Measured:
    z = calibrate(epsilon, 4, 1e-5, "all", 1.0) if epsilon else 0.0
    return Measured(
        kind=kind,
        rank=8,
        clients=clients,
        rounds=4,
        noise_multiplier=z,
        clipping_norm=0.3,
        server_learning_rate=1.5,
        server_learning_rate_min=0.5,
        batch_size=8,
        num_trainable=100,
        epsilon=epsilon,
        test_losses=(loss,),
    )


# A core is better under much noise, ffa-lora under little, IA3 without any.
FRONTIER = Frontier(
    "model",
    "data",
    4.0,
    3.0,
    {},
    (
        row("ffa-lora", 20, 8.0, 3.5),
        row("ffa-lora", 80, 8.0, 3.2),
        row("ffa-lora", 20, None, 3.1),
        row("lora-core", 20, 8.0, 3.4),
        row("lora-core", 80, 8.0, 3.3),
        row("ia3", 20, None, 3.0),
    ),
)

QUIET = {"privacy.unit": "none", "privacy.target-epsilon": 0.0}


@pytest.mark.parametrize(
    ("clients", "more", "kind"),
    [
        (20, {}, "lora-core"),
        (80, {}, "ffa-lora"),
        # For the same epsilon ten times the rounds have ten times the noise level.
        (80, {"num-server-rounds": 40}, "lora-core"),
        (80, {"privacy.target-epsilon": 2.0}, "lora-core"),
        (20, QUIET, "ia3"),
        (2, QUIET, "ia3"),
    ],
)
def test_the_kind_with_the_best_expected_gain_is_taken(clients, more, kind):
    assert choose_adapter(make_config(**more), clients, FRONTIER).kind == kind


def test_only_what_was_measured_with_as_many_local_steps_counts():
    steps = make_config().train.local_steps
    other = replace(row("ffa-lora", 20, 8.0, 3.01), local_steps=steps + 1)
    frontier = replace(FRONTIER, rows=(*FRONTIER.rows, other))
    more = make_config(**{"train.local-steps": steps + 1})

    assert choose_adapter(make_config(), 20, frontier).kind == "lora-core"
    assert choose_adapter(more, 20, frontier).kind == "ffa-lora"


def test_a_gain_with_less_noise_is_not_held_against_one_with_this_noise():
    loud = row("ffa-lora", 20, 2.0, 3.9)
    frontier = replace(FRONTIER, rows=(*FRONTIER.rows, loud))

    choice = choose_adapter(
        make_config(**{"privacy.target-epsilon": 2.0}), 20, frontier
    )

    assert choice.kind == "ffa-lora"
    assert choice.reason.endswith(": ffa-lora 10%")


def test_the_reason_is_one_line_with_the_gain_of_every_kind_that_was_measured():
    reason = choose_adapter(make_config(), 20, FRONTIER).reason

    assert reason.startswith(
        "share of the best gain, going by the noise alone, with 20 clients, 4 rounds"
    )
    assert reason.endswith("lora-core 60%, ffa-lora 50%")
    assert "\n" not in reason


@pytest.mark.parametrize("clients", [2, 400])
def test_without_evidence_the_default_is_used_and_named(clients):
    choice = choose_adapter(make_config(), clients, FRONTIER)

    assert choice.kind == "ffa-lora"
    assert f"nothing was measured near {clients} clients" in choice.reason


def test_given_noise_is_as_good_as_a_target_epsilon():
    noise = {
        "privacy.target-epsilon": 0.0,
        "privacy.noise-multiplier": calibrate(8.0, 4, 1e-5, "all", 1.0),
    }

    by_noise = choose_adapter(make_config(**noise), 20, FRONTIER)

    assert by_noise == choose_adapter(make_config(), 20, FRONTIER)


def test_a_gain_between_two_measurements_lies_between_theirs():
    levels = [r.noise_level for r in FRONTIER.rows if r.kind == "lora-core"]
    middle = (levels[0] * levels[1]) ** 0.5

    assert expected_gain("lora-core", levels[0], FRONTIER) == pytest.approx(0.6)
    assert expected_gain("lora-core", middle, FRONTIER) == pytest.approx(0.65)
    assert expected_gain("lora-core", 0.0, FRONTIER) is None
    assert expected_gain("ia3", levels[0], FRONTIER) is None


@given(st.sampled_from(list(KINDS)), st.floats(1e-9, 1e9))
def test_any_noise_has_a_known_gain_or_none(kind, level):
    gain = expected_gain(kind, level, FRONTIER)

    assert gain is None or 0.5 - 1e-9 <= gain <= 0.8 + 1e-9


def test_the_closed_list_is_every_kind_but_auto():
    assert {*KINDS, "auto"} == set(get_args(AdapterKind))
    assert {measured.kind for measured in load_frontier().rows} <= set(KINDS)


def test_the_package_has_evidence_for_its_own_default():
    config = parse_run_config({"adapter.kind": "auto"})

    assert choose_adapter(config, 20).reason.startswith("share of the best gain")


def test_the_kind_comes_with_the_step_that_it_was_measured_with():
    config = make_config()
    choice = Choice("ia3", "a reason", row("ia3", 20, 8.0, 2.9))

    resolved = with_choice(config, choice)

    assert resolved.adapter.kind == "ia3"
    assert resolved.privacy.clipping_norm == 0.3
    assert resolved.strategy.server_learning_rate == 1.5
    assert resolved.strategy.server_learning_rate_min == 0.5
    assert with_choice(config, Choice("ia3", "none")).privacy == config.privacy


def test_what_was_measured_with_another_rank_does_not_count():
    many = choose_adapter(make_config(**{"adapter.rank": 64}), 20, FRONTIER)
    same = choose_adapter(make_config(), 20, FRONTIER)

    assert many.measured is None and "nothing was measured" in many.reason
    assert same.measured is not None and same.measured.rank == 8
