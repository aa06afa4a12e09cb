"""The noise of a run with one noise for all records."""

import json

import pytest

from fedllm.commands import plan
from fedllm.config_parsing import parse_run_config
from fedllm.errors import ConfigError
from fedllm.planning.joint_noise import joint_plan, joint_settings
from fedllm.planning.plan_lines import record_plan_lines
from fedllm.privacy.accounting import record_epsilon

JOINT = {
    "privacy.unit": "record",
    "privacy.noise": "joint",
    "train.local-steps": 1,
    "train.batch-size": 4,
    "train.gradient-accumulation": 8,
    "num-server-rounds": 6,
}


def test_the_target_is_calibrated_for_all_steps_over_the_rows_of_all_clients():
    settings = joint_settings(parse_run_config(JOINT), [100, 220], 10)

    assert settings.expected_batch_size == 32
    assert settings.sampling_probability == 0.1
    event = (settings.noise_multiplier, 0.1, 6)
    assert 7.9 < record_epsilon([event], settings.delta) <= 8.0
    assert settings.delta == 1e-5


def test_fewer_declared_rows_than_a_batch_are_one_clear_line():
    with pytest.raises(ConfigError) as caught:
        joint_settings(parse_run_config(JOINT), [10, 21], 10)

    text = str(caught.value)
    assert "draws batches of 32 records" in text and "31 rows together" in text
    assert "\n" not in text


def test_all_clients_are_planned_for_together(capsys):
    typed = ["--run-config", "configs/record-joint.toml", "--records", "243"]

    plan.main([*typed, "--json"])
    found = json.loads(capsys.readouterr().out)
    plan.main(typed)
    text = capsys.readouterr().out

    assert found["num_records"] == 20 * 243
    event = (found["noise_multiplier"], 128 / 4860, 48)
    assert found["epsilon"] == record_epsilon([event], found["delta"])
    assert 7.9 < found["epsilon"] <= 8.0
    assert "all clients together, with 4,860 records: batches of about 128" in text


def test_a_plan_with_trustees_has_both_epsilons_and_the_noise_of_all(capsys):
    config = parse_run_config(
        {**JOINT, "privacy.trust": "trustees", "privacy.trustees": "a,b,c"}
        | {"privacy.target-epsilon": 0.0, "privacy.noise-multiplier": 1.0}
    )

    planned = joint_plan(config, 100, 4)

    opened = 1.0 * 1.5**0.5
    assert planned["opened_noise"] == pytest.approx(opened)
    event, delta = (opened, 32 / 400, 6), planned["delta"]
    assert planned["epsilon_adapters"] == record_epsilon([event], delta)
    text = "\n".join(record_plan_lines(config, planned))
    assert "3 trustees, of whom 1 may be the server's" in text
    assert f"noise of {opened / 32:.3g} times" in text
