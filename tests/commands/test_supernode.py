"""The command becomes Flower's SuperNode."""

import os
import sys
import tempfile
from collections.abc import Iterator

import pytest

from fedllm.commands import supernode as command
from fedllm.deployment import flower_programs, supernode
from fedllm.deployment.personal_watch import PERSONAL_WATCH_COMMAND

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks on Linux only")


@pytest.fixture
def becomes(monkeypatch, tmp_path) -> Iterator[list[list[str]]]:
    """What the command becomes, in place of becoming it."""
    calls: list[list[str]] = []
    monkeypatch.setattr(os, "execv", lambda _, words: calls.append(words))
    monkeypatch.setattr(flower_programs, "environment_bin", lambda: tmp_path)
    (tmp_path / "flower-supernode").touch()
    monkeypatch.setattr(os, "environ", dict(os.environ))
    for name in [name for name in os.environ if name.startswith("FLWR_")]:
        os.environ.pop(name)
    before = os.umask(0o022)
    yield calls
    os.umask(before)


def test_the_command_becomes_a_supernode_that_finds_the_program_first(
    becomes, monkeypatch, tmp_path
):
    socket = tmp_path / "here" / "socket"
    monkeypatch.setattr(supernode, "start_fork_server", lambda _: (socket, None, -1))
    before = os.environ["PATH"]
    command.main(["--insecure", "--port", "9094"])

    assert becomes == [
        [str(tmp_path / "flower-supernode"), "--insecure", "--port", "9094"]
    ]
    assert os.environ["PATH"] == f"{supernode.PROGRAMS}:{tmp_path}:{before}"
    assert os.environ["FEDLLM_FORK_SERVER"] == str(socket)
    assert os.environ["FLWR_SUPEREXEC_TASK_POLL_INTERVAL"] == "0.05"
    # A clinic's node would report its machine to Flower's makers for each client.
    assert os.environ["FLWR_TELEMETRY_ENABLED"] == "0"
    assert os.environ["FLWR_DISABLE_UPDATE_CHECK"] == "1"


@pytest.mark.parametrize(
    ("platform", "arguments"),
    [
        ("linux", ["--help"]),
        ("linux", ["--isolation", "process"]),
        ("linux", ["--isolation=process"]),
        ("linux", ["--allow-runtime-dependency-installation"]),
        ("darwin", []),
    ],
)
def test_the_command_starts_no_server_that_nobody_could_use(
    becomes, monkeypatch, platform, arguments
):
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(supernode, "start_fork_server", None)
    # Of an earlier node, perhaps of another user by now.
    monkeypatch.setenv("FEDLLM_FORK_SERVER", "/tmp/old")
    command.main([*arguments, "--any-app"])

    assert len(becomes) == 1
    assert "--help" in arguments or "FEDLLM_FORK_SERVER" not in os.environ


def test_a_node_whose_clients_cannot_be_forked_says_so_and_starts(
    becomes, monkeypatch, tmp_path, capsys
):
    nowhere = tmp_path / ("long" * 30)
    monkeypatch.setattr(tempfile, "tempdir", str(nowhere))
    monkeypatch.setenv("FEDLLM_HOME", str(nowhere))
    before = os.environ["PATH"]
    command.main([])

    assert len(becomes) == 1
    assert os.environ["PATH"] == f"{supernode.PROGRAMS}:{tmp_path}:{before}"
    said = capsys.readouterr().err
    assert "each client imports its libraries: AF_UNIX path too long" in said
    assert list(nowhere.iterdir()) == []


@pytest.mark.parametrize(
    "words",
    [
        ["--superlink", "a:9192", "--node-config", 'data-path="~/a b" delta=1e-5'],
        ["--isolation=subprocess", "--max-retries", "-1", "--", "rest", "-x"],
        ["--ho", "::1", "--hom", "x"],
    ],
)
def test_every_argument_but_home_is_handed_on_untouched(becomes, monkeypatch, words):
    monkeypatch.setattr(supernode, "can_fork", lambda _: False)
    command.main(words)

    assert becomes[0][1:] == words


def test_home_is_ours_and_made(becomes, monkeypatch, tmp_path):
    monkeypatch.setattr(supernode, "can_fork", lambda _: False)
    command.main(["--insecure", "--home", str(tmp_path / "node"), "--port", "1"])

    assert becomes[0][1:] == ["--insecure", "--port", "1"]
    assert os.environ["FEDLLM_HOME"] == str(tmp_path / "node")
    assert (tmp_path / "node").is_dir()
    assert (tmp_path / "node").stat().st_mode & 0o077 == 0


@pytest.mark.parametrize(
    "words",
    [
        ["--allow-runtime-dependency-installation"],
        ["--allow-run"],
        ["--isolation", "process"],
        ["--isolation=process"],
        ["--isol", "process"],
    ],
)
def test_clients_that_nothing_would_guard_are_refused_at_the_start(
    becomes, monkeypatch, words, capsys
):
    monkeypatch.setattr(supernode, "can_fork", lambda _: False)
    with pytest.raises(SystemExit, match="or add --any-app"):
        command.main(words)

    assert becomes == []
    command.main([*words, "--any-app"])
    assert len(becomes) == 1 and os.environ["FEDLLM_NODE_APP"] == "any"


def test_the_programs_that_a_server_may_ask_for_all_stand_first_on_path(becomes):
    from flwr.supercore.constant import TASK_TYPE_TO_COMMAND

    asked = set(TASK_TYPE_TO_COMMAND.values())
    assert {path.name for path in supernode.PROGRAMS.iterdir()} == asked
    assert all(os.access(path, os.X_OK) for path in supernode.PROGRAMS.iterdir())


def test_the_owners_choice_reaches_the_clients(becomes, monkeypatch, tmp_path):
    monkeypatch.setattr(supernode, "can_fork", lambda _: False)
    command.main(["--superlink", "a:9192"])
    assert os.environ["FEDLLM_NODE_APP"] == "installed"
    assert os.environ["FEDLLM_NODE_SUPERLINK"] == "a:9192"
    command.main(["--pin-app", "A" * 64, "--log-head", str(tmp_path / "head")])
    assert os.environ["FEDLLM_NODE_APP"] == "a" * 64
    assert os.environ["FEDLLM_LOG_HEAD"] == str(tmp_path / "head")
    with pytest.raises(SystemExit, match="--pin-app: needs the 64 hex digits"):
        command.main(["--pin-app", "abc"])


@pytest.mark.parametrize(
    ("words", "policy", "said"),
    [
        ([], "each", "--approve each, the default over TLS"),
        (["--insecure"], "all", "--approve all, the default with --insecure"),
        (["--insec"], "all", "--approve all, the default with --insecure"),
        (["--insecure", "--approve", "each"], "each", "--approve each)"),
        (["--approve", "all"], "all", "--approve all)"),
        (["--approve", "same-settings"], "same-settings", "--approve same-settings)"),
        (["--node-config", 'data-path="--insecure"'], "each", "the default over TLS"),
    ],
)
def test_over_tls_each_run_is_approved_unless_the_owner_says_otherwise(
    becomes, monkeypatch, capsys, words, policy, said
):
    monkeypatch.setattr(supernode, "can_fork", lambda _: False)
    command.main(words)

    assert os.environ["FEDLLM_NODE_APPROVE"] == policy
    (line,) = (x for x in capsys.readouterr().err.splitlines() if x.startswith("runs:"))
    assert said in line
    assert "--approve" not in becomes[0]


def test_a_home_or_key_that_others_may_write_is_refused(becomes, monkeypatch, tmp_path):
    monkeypatch.setattr(supernode, "can_fork", lambda _: False)
    lax, key = tmp_path / "lax", tmp_path / "key"
    lax.mkdir()
    lax.chmod(0o777)
    key.touch()
    key.chmod(0o666)
    with pytest.raises(SystemExit, match=f"others may write {lax}"):
        command.main(["--home", str(lax / "home")])
    monkeypatch.setenv("FEDLLM_HOME", str(tmp_path / "home"))
    with pytest.raises(SystemExit, match=f"others may write {key}"):
        command.main(["--auth-supernode-private-key", str(key)])
    monkeypatch.setattr(supernode, "PROGRAMS", tmp_path / "a:b")
    with pytest.raises(SystemExit, match="which a ':' would split"):
        command.main([])
    assert becomes == []


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('data-path="x" max-epsilon = 1.0', "is not part of a key=value pair"),
        ('data-path="x" max-eps=1.0', "max-eps: unknown"),
        ("max-epsilon=1.0", "needs data-path"),
    ],
)
def test_a_node_config_that_was_not_wholly_understood_starts_no_node(
    becomes, text, words
):
    with pytest.raises(SystemExit, match=words):
        command.main(["--insecure", "--node-config", text])

    assert not becomes


@pytest.mark.parametrize(
    ("words", "started"),
    [([], 0), (["--personal", "by-hand"], 0), (["--personal", "after-run"], 1)],
)
def test_personal_training_beside_the_node_is_the_owners_choice(
    words, started, becomes, monkeypatch
):
    calls = []
    monkeypatch.setattr(supernode, "can_fork", lambda arguments: False)
    monkeypatch.setattr(supernode, "start_helper", calls.append)
    command.main(["--insecure", *words])

    assert calls == [PERSONAL_WATCH_COMMAND] * started
    assert becomes[0][1:] == ["--insecure"]
