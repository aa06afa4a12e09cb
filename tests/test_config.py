"""The run config: defaults, errors, and that every key is used."""

import re
import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedllm.config import RunConfig, fedllm_home, flat, parse_run_config
from fedllm.errors import ConfigError

ROOT = Path(__file__).parent.parent


def flatten(section: dict, prefix: str = "") -> dict:
    out = {}
    for key, value in section.items():
        if isinstance(value, dict):
            out |= flatten(value, f"{prefix}{key}.")
        else:
            out[prefix + key] = value
    return out


def read_toml(path: Path) -> dict:
    return tomllib.loads(path.read_text("utf-8"))


def test_pyproject_states_every_key_with_its_default():
    stated = flatten(
        read_toml(ROOT / "pyproject.toml")["tool"]["flwr"]["app"]["config"]
    )

    assert stated == flat(RunConfig())
    assert {k: type(v) for k, v in stated.items()} == {
        k: type(v) for k, v in flat(RunConfig()).items()
    }


def test_every_key_is_read_somewhere_in_the_package():
    code = "\n".join(
        path.read_text("utf-8")
        for path in (ROOT / "fedllm").rglob("*.py")
        if path.name != "config.py"
    )

    unread = [
        key
        for key in flat(RunConfig())
        if f".{key.rpartition('.')[2].replace('-', '_')}" not in code
    ]

    assert unread == []


def test_preferences_are_read_as_such_whatever_reads_the_rows():
    config = parse_run_config({"train.objective": "dpo"})

    assert config.data.format == "preference"
    assert parse_run_config(flat(config)) == config
    assert parse_run_config({}).data.format == "auto"


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


@pytest.mark.parametrize("preset", sorted((ROOT / "configs").glob("*.toml")))
def test_a_preset_is_valid_and_its_keys_are_known_to_flower(preset: Path):
    values = flatten(read_toml(preset))

    parse_run_config({**flat(RunConfig()), **values})

    assert set(values) <= set(flat(RunConfig()))


@pytest.mark.parametrize("preset", sorted((ROOT / "configs").glob("*.toml")))
def test_a_preset_says_its_whole_command(preset: Path):
    text = preset.read_text("utf-8")

    clients = read_toml(preset)["strategy"]["num-clients"]

    assert f"--run-config configs/{preset.name}" in text
    assert re.search(rf"num-supernodes[ =]{clients}\b", text)


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


def test_a_sealed_run_names_its_trustees_in_order():
    config = parse_run_config({**SEALED, "privacy.trustees": " c, a ,b-1.x"})

    assert config.is_sealed
    assert config.trustees == ("c", "a", "b-1.x")
    assert config.least_trustees == 3
    assert not parse_run_config({}).is_sealed


def test_a_run_of_records_with_joint_noise_may_be_sealed():
    config = parse_run_config({**RECORD_JOINT, **SEALED})

    assert config.is_sealed and config.is_joint
    assert config.trustees == ("a", "b", "c")


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


def test_the_home_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("FEDLLM_HOME", str(tmp_path / "elsewhere"))

    assert fedllm_home() == tmp_path / "elsewhere"


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
