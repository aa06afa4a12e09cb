"""Nobody else may write what is trusted."""

import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from fedllm import strict_modes
from fedllm.client.log import ClientLog
from fedllm.client.refusals import Refusals
from fedllm.commands import simulate
from fedllm.deployment.flower_programs import make_home
from fedllm.deployment.superlink import superlink_arguments
from fedllm.errors import ConfigError
from fedllm.node.log import node_folder
from fedllm.privacy.node_ledger import NodeLedger
from fedllm.privacy.record_ledger import RecordLedger
from fedllm.privacy.released_rounds import ReleasedRounds
from fedllm.runs.directory import RunDirectory
from fedllm.strict_modes import make_strict_folder, require_strict_modes
from tests.helpers.key_folders import make


@pytest.fixture
def home(tmp_path) -> Path:
    home = tmp_path / "above" / "home"
    home.mkdir(parents=True, mode=0o700)
    home.parent.chmod(0o755)
    (home / "key").write_text("secret")
    return home


@pytest.fixture
def user(monkeypatch) -> SimpleNamespace:
    """A user whose own group is that of the files, and what the system knows of both."""
    user = SimpleNamespace(users=[("ann", 7)], name="ann", members=[])

    def getgrgid(gid):
        if user.name is None:
            raise KeyError(gid)
        return SimpleNamespace(gr_name=user.name, gr_mem=user.members)

    def entries():
        return [
            SimpleNamespace(pw_name=name, pw_uid=uid, pw_gid=os.getegid())
            for name, uid in user.users
        ]

    monkeypatch.setattr(strict_modes, "grp", SimpleNamespace(getgrgid=getgrgid))
    monkeypatch.setattr(strict_modes, "pwd", SimpleNamespace(getpwall=entries))
    monkeypatch.setattr(strict_modes, "os", OsOfUser())
    return user


class OsOfUser:
    """The operating system as user 7 sees it, who owns what this user owns."""

    def geteuid(self) -> int:
        return 7

    def lstat(self, path):
        status = os.lstat(path)
        owner = 7 if status.st_uid == os.geteuid() else status.st_uid
        return os.stat_result([*status[:4], owner, *status[5:10]])

    def __getattr__(self, name):
        return getattr(os, name)


def test_a_folder_of_ones_own_will_do_and_so_will_one_to_come(home):
    require_strict_modes(home)
    require_strict_modes(home / "key")
    require_strict_modes(home / "to" / "come")


@pytest.mark.parametrize("mode", [0o770, 0o702, 0o777, 0o2775])
@pytest.mark.parametrize("part", ["", "home", "home/key"])
def test_what_others_may_write_is_refused_by_its_name(home, mode, part, user):
    user.name = "staff"
    lax = home.parent / part
    lax.chmod(mode)

    with pytest.raises(ConfigError, match=rf"others may write {lax} .*: chmod go-w"):
        require_strict_modes(home / "key")


@pytest.mark.parametrize("name", ["ann", None])
def test_a_group_that_has_no_other_member_may_write(home, user, name):
    home.chmod(0o2775)
    user.name = name
    require_strict_modes(home / "key")
    home.chmod(0o777)
    with pytest.raises(ConfigError, match="others may write"):
        require_strict_modes(home / "key")


@pytest.mark.parametrize(
    "other",
    [
        {"members": ["bob"]},
        {"members": ["ann", "bob"]},
        {"name": "staff"},
        {"users": [("ann", 7), ("bob", 8)]},
        {"users": [("ann", 7), ("bob", 8)], "name": None},
    ],
)
def test_a_group_that_may_have_another_member_may_not_write(home, user, other):
    home.chmod(0o770)
    user.__dict__.update(other)
    with pytest.raises(ConfigError, match="others may write"):
        require_strict_modes(home / "key")


def test_another_group_than_the_users_own_may_not_write(home, user, monkeypatch):
    home.chmod(0o770)
    monkeypatch.setattr(OsOfUser, "getegid", lambda _: os.getegid() + 1, raising=False)
    with pytest.raises(ConfigError, match="others may write"):
        require_strict_modes(home / "key")


def test_a_folder_is_made_for_its_owner_alone_whatever_the_umask(home):
    before = os.umask(0)
    try:
        make_strict_folder(home / "a" / "b")
        make_strict_folder(home / "a" / "b")
    finally:
        os.umask(before)
    for folder in (home / "a", home / "a" / "b"):
        assert folder.stat().st_mode & 0o777 == 0o700
    (home / "a").chmod(0o777)
    with pytest.raises(ConfigError, match="others may write"):
        make_strict_folder(home / "a" / "b" / "c")
    with pytest.raises(FileExistsError):
        make_strict_folder(home / "key")


def test_a_sticky_folder_may_be_written_and_a_sticky_file_not(home):
    home.parent.chmod(0o1777)
    require_strict_modes(home / "key")
    (home / "key").chmod(0o1666)

    with pytest.raises(ConfigError, match="others may write"):
        require_strict_modes(home / "key")


@pytest.mark.parametrize("part", ["", "home", "home/key"])
def test_what_another_user_owns_is_refused(home, monkeypatch, part):
    foreign = home.parent / part
    real = os.lstat

    def lstat(path):
        status = real(path)
        if Path(path) != foreign:
            return status
        return os.stat_result([*status[:4], os.geteuid() + 1, *status[5:10]])

    monkeypatch.setattr(strict_modes.os, "lstat", lstat)
    with pytest.raises(ConfigError, match=rf"user \d+ owns {foreign} "):
        require_strict_modes(home / "key")


@pytest.mark.parametrize("relative", [True, False])
def test_a_link_in_the_middle_is_followed_to_what_others_may_write(
    home, tmp_path, relative
):
    lax = tmp_path / "lax"
    (lax / "models").mkdir(parents=True)
    lax.chmod(0o777)
    target = Path("../../lax/models") if relative else lax / "models"
    (home / "models").symlink_to(target)

    with pytest.raises(ConfigError, match=rf"others may write {lax} "):
        require_strict_modes(home / "models" / "tiny")
    lax.chmod(0o755)
    require_strict_modes(home / "models" / "tiny")


def test_links_in_a_circle_end(home):
    (home / "a").symlink_to(home / "b")
    (home / "b").symlink_to(home / "a")

    with pytest.raises(ConfigError, match="too many symbolic links"):
        require_strict_modes(home / "a")


def new_run(home: Path) -> None:
    RunDirectory.create(home, 5)


def resumed_run(home: Path) -> None:
    folder = home / "runs" / "run"
    folder.mkdir(parents=True, exist_ok=True)
    RunDirectory(folder).lock()


WRITERS = {
    "any home": lambda home: make_home(str(home)),
    "a new run": new_run,
    "a resumed run": resumed_run,
    "the rounds released": lambda home: ReleasedRounds(
        home, "2026-01-01_00-00-00_1"
    ).begin(),
    "a record ledger": lambda home: RecordLedger(home / "ledgers" / "own"),
    "a node's ledger": lambda home: NodeLedger(home / "ledgers" / "node"),
    "refusals": lambda home: Refusals(home / "refusals", 5, 0).begin(),
    "a node's own folder": lambda home: node_folder(),
    "a SuperLink": lambda home: superlink_arguments(
        None, 1, str(home / "superlink.db"), ["--insecure"]
    ),
    "a simulation": lambda home: simulate.run(simulate.parser().parse_args([])),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_no_writer_trusts_a_home_that_others_may_write(home, monkeypatch, writer):
    monkeypatch.setenv("FEDLLM_HOME", str(home))
    if writer != "a simulation":
        WRITERS[writer](home)
        shutil.rmtree(home / "released", ignore_errors=True)
    home.chmod(0o777)

    with pytest.raises(ConfigError, match=f"others may write {home}"):
        WRITERS[writer](home)


def test_a_clients_log_is_not_written_where_others_may_write(home, monkeypatch, caplog):
    monkeypatch.setenv("FEDLLM_HOME", str(home))
    log = ClientLog(0, 1)
    log.write("first")
    home.chmod(0o777)
    log.write("second")

    assert "others may write" in caplog.text
    assert "second" not in (home / "logs" / "client-0.log").read_text()


def test_a_superlinks_keys_are_its_owners_alone(home):
    make(home / "keys")
    arguments = superlink_arguments(home / "keys", 1, ":flwr-in-memory:", [])
    assert "--enable-supernode-auth" in arguments
    (home / "keys" / "server.key").chmod(0o620)
    with pytest.raises(ConfigError, match="others may write .*server.key"):
        superlink_arguments(home / "keys", 1, ":flwr-in-memory:", [])
