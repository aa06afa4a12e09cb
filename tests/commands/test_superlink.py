"""The command becomes Flower's SuperLink, with nothing to export."""

import os

import pytest

from fedllm.commands import superlink
from fedllm.deployment import flower_programs
from tests.helpers.commands import exit_status
from tests.helpers.key_folders import make


@pytest.fixture
def becomes(monkeypatch, tmp_path) -> list[list[str]]:
    """What the command becomes, in place of becoming it."""
    calls: list[list[str]] = []
    monkeypatch.setattr(os, "execv", lambda _, words: calls.append(words))
    monkeypatch.setattr(flower_programs, "environment_bin", lambda: tmp_path)
    (tmp_path / "flower-superlink").touch()
    exported = {k: v for k, v in os.environ.items() if not k.startswith("FLWR_")}
    monkeypatch.setattr(os, "environ", exported)
    before = os.umask(0o022)
    yield calls
    os.umask(before)


@pytest.fixture
def keys(tmp_path, capsys):
    make(tmp_path / "keys")
    capsys.readouterr()
    return tmp_path / "keys"


def test_it_becomes_a_superlink_with_tls_node_keys_and_a_database(
    becomes, keys, tmp_path
):
    home = tmp_path / "fed" / "server"
    superlink.main(["--keys", str(keys), "--home", str(home)])

    (words,) = becomes
    assert words == [
        str(tmp_path / "flower-superlink"),
        *("--port", "9191", "--database", str(home / "superlink.db")),
        *("--ssl-ca-certfile", str(keys / "ca.crt")),
        *("--ssl-certfile", str(keys / "server.crt")),
        *("--ssl-keyfile", str(keys / "server.key")),
        "--enable-supernode-auth",
    ]
    assert home.is_dir()
    # Flower reports to its makers otherwise.
    assert os.environ["FLWR_TELEMETRY_ENABLED"] == "0"


def test_nothing_need_be_exported_and_what_is_exported_wins(
    becomes, keys, tmp_path, monkeypatch
):
    monkeypatch.setenv("FLWR_TELEMETRY_ENABLED", "1")
    before = os.environ["PATH"]
    superlink.main(["--keys", str(keys), "--home", str(tmp_path / "server")])

    environ = os.environ
    assert environ["FEDLLM_HOME"] == str(tmp_path / "server")
    assert environ["FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION"] == "1"
    assert environ["FLWR_DISABLE_UPDATE_CHECK"] == "1"
    assert environ["FLWR_TELEMETRY_ENABLED"] == "1"
    assert environ["PATH"] == f"{tmp_path}:{before}"
    assert os.umask(0o077) == 0o077


def test_arguments_of_flower_are_handed_on_last_so_that_they_win(
    becomes, keys, tmp_path
):
    more = ["--port", "7000", "--database", "x.db", "--isolation", "process"]
    superlink.main(["--keys", str(keys), "--home", str(tmp_path), *more])

    assert becomes[0][1:5] == ["--port", "7000", "--database", "x.db"]
    assert becomes[0][-2:] == ["--isolation", "process"]


@pytest.mark.parametrize("own", [["--insecure"], ["--ssl-certfile=mine.crt"]])
def test_a_transport_of_ones_own_needs_no_keys(becomes, own, tmp_path):
    superlink.main(["--home", str(tmp_path), *own])

    assert becomes[0][-1:] == own and "--enable-supernode-auth" not in becomes[0]


def test_without_keys_the_error_names_the_command_that_makes_them(becomes, tmp_path):
    home = ["--home", str(tmp_path)]
    for words in (home, [*home, "--keys", str(tmp_path / "none")]):
        ended = str(exit_status(superlink.main, words))

        assert ended.startswith("ConfigError: --keys: ") and "`fedllm keys`" in ended
    assert str(tmp_path / "none" / "server.key") in ended
    assert becomes == []


def test_a_home_that_cannot_be_made_is_one_line(becomes, keys, tmp_path):
    (tmp_path / "file").touch()
    words = ["--keys", str(keys), "--home", str(tmp_path / "file" / "home")]

    assert "--home: " in str(exit_status(superlink.main, words))


@pytest.mark.parametrize("word", ["-h", "--help", "--version", "-V"])
def test_help_is_ours_and_then_flowers(becomes, capsys, word):
    superlink.main([word])

    assert becomes[0][1:] == [word]
    assert ("--keys DIR" in capsys.readouterr().out) == (word in ("-h", "--help"))


def test_a_wipe_starts_nothing_and_is_of_the_home_that_is_named(becomes, tmp_path):
    (tmp_path / "superlink.db").touch()
    superlink.main(["--home", str(tmp_path), "--wipe"])

    assert becomes == []
    absent = ["--home", str(tmp_path), "--database", str(tmp_path / "x"), "--wipe"]
    assert "cannot be wiped" in str(exit_status(superlink.main, absent))
