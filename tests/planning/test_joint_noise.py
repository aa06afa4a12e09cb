"""The noise of a run with one noise for all records."""

import pytest

from fedllm.config import parse_run_config
from fedllm.errors import ConfigError
from fedllm.planning.joint_noise import joint_settings
from fedllm.privacy.accounting import record_epsilon

JOINT = {
    "privacy.unit": "record",
    "privacy.noise": "joint",
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
