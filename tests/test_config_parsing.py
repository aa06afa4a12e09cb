"""A flat run config becomes its sections, or an error that names every bad key."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedllm.config import RunConfig, flat
from fedllm.config_parsing import parse_run_config
from fedllm.errors import ConfigError


def test_preferences_are_read_as_such_whatever_reads_the_rows():
    config = parse_run_config({"train.objective": "dpo"})

    assert config.data.format == "preference"
    assert parse_run_config(flat(config)) == config
    assert parse_run_config({}).data.format == "auto"


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("bogus", 1, "bogus: unknown key"),
        ("train.batch-sise", 8, "did you mean train.batch-size?"),
        ("train.batch-size", "8", "must be an integer (got '8')"),
        ("train.batch-size", True, "must be an integer (got True)"),
        ("train.batch-size", 0, "must be >= 1 (got 0)"),
        ("train.learning-rate", float("nan"), "must be a finite number (got nan)"),
        ("train.learning-rate", float("inf"), "must be a finite number (got inf)"),
        ("train.learning-rate", -1.0, "must be greater than 0 (got -1.0)"),
        ("model.quantization", 5, "must be 0, 4 or 8 (got 5)"),
        ("model.quantization", False, "must be an integer (got False)"),
        ("model.name", "", "model.name"),
        ("adapter.kind", "qlora", "'ia3', 'vera' or 'auto' (got 'qlora')"),
        ("adapter.target-modules", "", "adapter.target-modules"),
        ("adapter.rank", 0, "adapter.rank"),
        ("privacy.clipping-norm", -1, "privacy.clipping-norm: must be >= 0.000000001"),
        ("privacy.delta", 1.0, "privacy.delta: must be less than or equal to 0.001"),
        ("privacy.delta", 0.00101, "(got 0.00101)"),
        ("privacy.delta", 9e-13, "must be 0.0 or at least 1e-12 (got 9e-13)"),
        ("privacy.delta", -1e-6, "privacy.delta: must be >= 0"),
        ("privacy.noise-multiplier", 1.0, "not both"),
        ("privacy.target-epsilon", 0.0, "must be above 0.0"),
        ("privacy.max-epsilon", 1.0, "privacy.max-epsilon"),
        ("privacy.unit", "none", None),
        ("privacy.unit", "recordd", "privacy.unit"),
        (
            "strategy.fraction-train",
            0.5,
            "must be 1.0 if strategy.sampling is 'all'",
        ),
        (
            "strategy.fraction-evaluate",
            0.5,
            "clients' losses would leave without noise",
        ),
        ("data.encoding", "cp1252", None),
        ("data.encoding", "klingon", "data.encoding: must be an encoding that Python"),
        ("data.encoding", "utf-16", "that has ASCII in it"),
        ("data.encoding", "utf-7", "that has ASCII in it"),
        ("data.encoding", "hex", "that has ASCII in it"),
        ("data.format", "alpaca", "data.format: must be 'auto', 'messages'"),
        ("data.held-out-fraction", 0.5, "must be above 0.0 if strategy.fraction"),
        ("data.held-out-fraction", 1.0, "data.held-out-fraction: must be less than 1"),
        ("personal.epochs", -1.0, "personal.epochs: must be >= 0"),
        ("personal.epochs", 0.5, None),
        ("personal.learning-rate", 0.1, "is for personal.epochs above 0.0 (got 0.1"),
        ("personal.proximal-mu", 0.1, "is for personal.epochs above 0.0 (got 0.1"),
        ("strategy.aggregator", "krum", "the bound is proved for a sum"),
        ("strategy.num-clients", 1, "strategy.num-clients"),
        ("train.learning-rate-min", 5.0, "must be <= train.learning-rate"),
        ("model", 3, "model"),
        ("num-server-rounds", 2.5, "num-server-rounds: must be an integer"),
    ],
)
def test_a_bad_setting_is_named_with_what_is_allowed(key, value, said):
    mapping = {**flat(RunConfig()), key: value}

    if said is None:
        parse_run_config(mapping)
        return
    with pytest.raises(ConfigError) as caught:
        parse_run_config(mapping)

    assert said in str(caught.value)


def test_all_bad_settings_are_named_at_once():
    with pytest.raises(ConfigError) as caught:
        parse_run_config(
            {"a": 1, "train.batch-size": 0, "adapter.rank": -3, "seed": 1.5}
        )

    lines = str(caught.value).splitlines()

    assert [line.split(":")[0] for line in lines] == [
        "a",
        "adapter.rank",
        "seed",
        "train.batch-size",
    ]


@given(
    key=st.sampled_from(sorted(flat(RunConfig()))),
    value=st.one_of(
        st.booleans(),
        st.integers(),
        st.floats(allow_nan=True, allow_infinity=True),
        st.text(max_size=20),
    ),
)
def test_any_value_gives_a_config_or_a_config_error(key, value):
    try:
        config = parse_run_config({**flat(RunConfig()), key: value})
    except ConfigError as error:
        assert key in str(error) or "privacy" in str(error) or "strategy" in str(error)
    else:
        # An integer of many digits loses some where a float is wanted.
        wanted = type(flat(RunConfig())[key])
        assert flat(config)[key] == wanted(value)
