"""The noise of a run with one noise for all records."""

import json

import pytest

from fedllm.commands import plan
from fedllm.config import parse_run_config
from fedllm.errors import ConfigError
from fedllm.planning.joint_noise import joint_settings
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
