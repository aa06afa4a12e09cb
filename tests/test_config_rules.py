"""What does not go together in a run config is one line, and nothing else is an error."""

import pytest

from fedllm.config_parsing import parse_run_config
from fedllm.errors import ConfigError


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            {"train.objective": "dpo", "data.format": "messages"},
            "data.format: must be 'auto' or 'preference' under train.objective='dpo'",
        ),
        ({"data.format": "preference"}, "is for train.objective='dpo' (got 'sft')"),
        ({"train.dpo-beta": 0.2}, "train.dpo-beta: is for train.objective='dpo'"),
    ],
)
def test_an_objective_and_its_rows_must_fit(settings, said):
    with pytest.raises(ConfigError) as caught:
        parse_run_config(settings)

    assert said in str(caught.value)


RECORD_JOINT = {
    "privacy.unit": "record",
    "privacy.noise": "joint",
    "train.local-steps": 1,
}


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("privacy.unit", "client", "'joint' is for privacy.unit='record'"),
        ("strategy.aggregator", "krum", "must be 'mean' under privacy.noise='joint'"),
        ("strategy.aggregator", "median", "the bound is proved for a sum"),
        ("train.local-steps", 2, "must be 1 under privacy.noise='joint'"),
        ("train.local-steps", 0, "every step is a round"),
        ("strategy.sampling", "poisson", "the coins are those of rows"),
        ("train.optimizer", "adamw", "the server takes the step"),
        ("train.learning-rate", 2.0, "strategy.server-learning-rate"),
        ("train.max-grad-norm", 1.0, "the server takes the step"),
        ("adapter.dropout", 0.1, "under privacy.unit='record'"),
    ],
)
def test_what_does_not_go_with_joint_noise_is_one_clear_line(key, value, said):
    parse_run_config(RECORD_JOINT)

    with pytest.raises(ConfigError) as caught:
        parse_run_config({**RECORD_JOINT, key: value})

    assert str(caught.value).startswith(f"{key}: " if key != "privacy.unit" else "")
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


SEALED = {"privacy.trust": "trustees", "privacy.trustees": "a,b,c"}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"strategy.sampling": "poisson", "strategy.fraction-train": 0.5}, "amplify"),
        ({"strategy.aggregator": "median"}, "proved for a sum"),
        ({"privacy.unit": "record"}, "own noise protects"),
        ({"privacy.unit": "none", "privacy.target-epsilon": 0.0}, "no noise"),
        ({"privacy.trustees": ""}, "must name 2 to 10"),
        ({"privacy.trustees": "a"}, "must name 2 to 10"),
        ({"privacy.trustees": ",".join("abcdefghijk")}, "must name 2 to 10"),
        ({"privacy.trustees": "a,a,b"}, "twice"),
        ({"privacy.trustees": "a,B"}, "small letters"),
        ({"privacy.least-trustees": 1}, "must be 0, or 2 to the 3"),
        ({"privacy.least-trustees": 4}, "must be 0, or 2 to the 3"),
        ({"privacy.colluding-trustees": 3}, "must be below the 3"),
        ({"privacy.least-trustees": 2, "privacy.colluding-trustees": 2}, "below the 2"),
    ],
)
def test_what_does_not_go_with_trustees_is_one_clear_line(changes, said):
    with pytest.raises(ConfigError, match=said) as error:
        parse_run_config({**SEALED, **changes})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("privacy.trustees", "a,b"),
        ("privacy.least-trustees", 2),
        ("privacy.colluding-trustees", 2),
        ("privacy.post-quantum", False),
    ],
)
def test_a_setting_of_trustees_is_not_ignored_without_them(key, value):
    with pytest.raises(ConfigError, match=f"{key}: is for privacy.trust='trustees'"):
        parse_run_config({key: value})


def test_a_run_of_records_with_joint_noise_may_be_sealed():
    config = parse_run_config({**RECORD_JOINT, **SEALED})

    assert config.is_sealed and config.is_joint
    assert config.trustees == ("a", "b", "c")


def test_no_privacy_does_not_silently_ignore_a_noise_setting():
    with pytest.raises(ConfigError, match="adds no noise"):
        parse_run_config(
            {"privacy.unit": "none", "privacy.target-epsilon": 0.0}
            | {"privacy.noise-multiplier": 1.0}
        )


@pytest.mark.parametrize("kind", ["ia3", "auto"])
def test_dropout_is_refused_where_the_kind_may_have_none(kind):
    with pytest.raises(ConfigError, match="adapter.dropout: must be 0.0 if"):
        parse_run_config({"adapter.kind": kind, "adapter.dropout": 0.1})

    assert parse_run_config({"adapter.kind": kind}).adapter.kind == kind


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("adapter.kind", "auto", "name one under privacy.unit='record'"),
        ("adapter.dropout", 0.1, "must be 0.0 under privacy.unit='record'"),
        ("model.quantization", 8, "must be 0 or 4 under privacy.unit='record'"),
        ("train.activation-compression", True, "must be false under privacy.unit='rec"),
        ("train.plugin", "ours:make", "must be empty under privacy.unit='record'"),
        ("strategy.fraction-evaluate", 0.5, "under privacy.unit='record'"),
        ("privacy.noise-multiplier", 1.0, "not both"),
        ("privacy.target-epsilon", 0.0, "must be above 0.0"),
        ("privacy.max-grad-norm", 0.0, "privacy.max-grad-norm: must be >= 0.000000001"),
        ("strategy.aggregator", "median", None),
        ("train.proximal-mu", 0.1, None),
    ],
)
def test_record_level_refuses_what_would_break_its_bound(key, value, said):
    mapping = {"privacy.unit": "record", key: value}

    if said is None:
        parse_run_config(mapping)
        return
    with pytest.raises(ConfigError) as caught:
        parse_run_config(mapping)

    assert said in str(caught.value)


def test_what_is_computed_again_is_not_compressed():
    both = {"train.gradient-checkpointing": True, "train.activation-compression": True}

    with pytest.raises(
        ConfigError, match="train.activation-compression: must be false"
    ):
        parse_run_config(both)


def test_a_noise_multiplier_is_allowed_where_target_epsilon_is_unset():
    config = parse_run_config(
        {"privacy.noise-multiplier": 0.02, "privacy.target-epsilon": 0.0}
    )

    assert config.privacy.noise_multiplier == 0.02


def test_two_tenths_that_are_held_out_leave_rows_to_train_on():
    held = {
        "privacy.unit": "none",
        "privacy.target-epsilon": 0.0,
        "strategy.fraction-evaluate": 1.0,
        "data.held-out-fraction": 0.9,
    }
    parse_run_config(held)
    with pytest.raises(ConfigError, match=r"must be below 0\.9 if personal\.epochs"):
        parse_run_config({**held, "personal.epochs": 1.0})


LATE, FEW = {"strategy.late-replies": "next-round"}, {"strategy.min-replies": 2}


TRUSTED = {"privacy.trust": "trustees", "privacy.trustees": "a,b"}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {**LATE, "strategy.sampling": "poisson", "strategy.fraction-train": 0.5},
            "strategy.late-replies: must be 'drop' under strategy.sampling='poisson'",
        ),
        ({**LATE, "privacy.unit": "record"}, "under privacy.unit='record'"),
        (
            {**LATE, "privacy.unit": "record", "privacy.noise": "joint"},
            "strategy.late-replies: must be 'drop' under privacy.noise='joint'",
        ),
        ({**LATE, **TRUSTED}, "must be 'drop' under privacy.trust='trustees'"),
        (FEW, "strategy.min-replies: must be 0 under privacy.unit='client'"),
        ({**FEW, "privacy.unit": "record"}, "must be 0 under privacy.unit='record'"),
    ],
)
def test_a_round_whose_close_a_client_could_decide_is_refused(changes, said):
    with pytest.raises(ConfigError, match=said):
        parse_run_config(changes)


@pytest.mark.parametrize("sampling", ["all", "fixed"])
def test_late_replies_count_at_client_level_and_without_dp(sampling):
    parse_run_config({**LATE, "strategy.sampling": sampling})
    without = {"privacy.unit": "none", "strategy.sampling": "poisson"}
    parse_run_config({**LATE, **FEW, **without})
