"""What commands share: settings over pyproject.toml, exit statuses, other's arguments."""

import argparse

import pytest

from fedllm.commands import options
from fedllm.commands.options import parse_pairs
from fedllm.errors import ConfigError
from tests.helpers.commands import exit_status
from tests.helpers.plans import plan_json


def test_the_apps_own_settings_count_where_nothing_is_typed(
    capsys, tmp_path, monkeypatch
):
    (tmp_path / "pyproject.toml").write_text(
        "[tool.flwr.app.config]\nnum-server-rounds = 9\nadapter.rank = 4\n"
    )
    monkeypatch.chdir(tmp_path)

    found = plan_json(capsys)

    assert (found["num_rounds"], found["num_trainable"]) == (9, 92_160)


def test_a_typed_file_comes_before_the_flags(capsys, tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text("num-server-rounds = 7\n[strategy]\nnum-clients = 33\n")

    found = plan_json(capsys, "--run-config", str(file), "--rounds", "2")

    assert (found["num_clients"], found["num_rounds"]) == (33, 2)
    pairs = plan_json(capsys, "--run-config", "num-server-rounds=9 adapter.rank=4")
    assert (pairs["num_rounds"], pairs["num_trainable"]) == (9, 92_160)


def test_a_later_value_wins_whether_it_is_a_file_or_pairs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "mine.toml"
    file.write_text("num-server-rounds = 7\n[adapter]\nrank = 2\n")
    pairs = "num-server-rounds=9"

    for values, rounds in (([str(file), pairs], 9), ([pairs, str(file)], 7)):
        settings = options.read_settings(values)
        assert settings["num-server-rounds"] == rounds
        assert settings["adapter.rank"] == 2
        assert options.read_run_config(values).num_server_rounds == rounds


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("gone.toml", "gone.toml: cannot be read"),
        ("bad.toml", "bad.toml: is not TOML"),
        ("rounds", "needs a .toml file or key=value pairs (got 'rounds')"),
        ("a=[b", "--run-config: "),
    ],
)
def test_a_value_that_cannot_be_read_is_named(value, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.toml").write_text("a = = b")
    with pytest.raises(ConfigError) as caught:
        options.read_values([value])

    assert str(caught.value).startswith("--run-config: ") and words in str(caught.value)


def ended(run, *words, **more):
    parser = options.new_parser("try", "Try.", **more)
    parser.add_argument("--ours", action="store_true")
    return exit_status(
        lambda given: options.run_command(parser, run, given, **more), words
    )


def raising(error):
    def run(args):
        raise error

    return run


@pytest.mark.parametrize(
    ("run", "status"),
    [
        (lambda args: 0, 0),
        (lambda args: 3, 3),
        (raising(KeyboardInterrupt()), 130),
        (raising(argparse.ArgumentError(None, "--ours: not with that")), 2),
        (raising(ConfigError("a: b\nc: d")), "ConfigError: a: b\nConfigError: c: d"),
    ],
)
def test_a_command_ends_with_the_status_of_what_happened(run, status, capsys):
    assert ended(run) == status
    error = capsys.readouterr().err
    assert ("usage: fedllm try" in error and "not with that" in error) == (status == 2)


def test_an_error_that_no_user_can_cause_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        ended(raising(ZeroDivisionError()))


def test_unknown_arguments_are_an_error_unless_they_are_handed_on(capsys):
    seen = []

    assert ended(lambda args: seen.append(args) or 0, "--theirs", "x") == 2
    assert (
        ended(lambda a: seen.append(a) or 0, "--theirs", "--ours", hands_on=True) == 0
    )
    assert [(a.ours, a.others) for a in seen] == [(True, ["--theirs"])]


@pytest.mark.parametrize(
    "text",
    [
        "privacy.target-epsilon = 2.0",
        "privacy.target-epsilon= 2.0",
        "num-server-rounds=9, adapter.rank 4",
        "num-server-rounds=9 rounds",
    ],
)
def test_text_that_flowers_parser_passes_over_is_an_error(text):
    # Flower takes the first for no setting at all, and the run would spend the default.
    with pytest.raises(ConfigError, match="--run-config"):
        parse_pairs(text, "--run-config")


def test_pairs_are_understood_whole():
    text = "a=1 b='x y' c=\"z = 3\"\n d=2.5 "

    assert parse_pairs(text, "--x") == {"a": 1, "b": "x y", "c": "z = 3", "d": 2.5}
