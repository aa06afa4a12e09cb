"""Nobody else may write what is trusted."""

import os
from pathlib import Path

import pytest

from fedllm import strict_modes
from fedllm.errors import ConfigError
from fedllm.strict_modes import require_strict_modes


@pytest.fixture
def home(tmp_path) -> Path:
    home = tmp_path / "above" / "home"
    home.mkdir(parents=True, mode=0o700)
    home.parent.chmod(0o755)
    (home / "key").write_text("secret")
    return home


def test_a_folder_of_ones_own_will_do_and_so_will_one_to_come(home):
    require_strict_modes(home)
    require_strict_modes(home / "key")
    require_strict_modes(home / "to" / "come")


@pytest.mark.parametrize("mode", [0o770, 0o702, 0o777, 0o2775])
@pytest.mark.parametrize("part", ["", "home", "home/key"])
def test_what_others_may_write_is_refused_by_its_name(home, mode, part):
    lax = home.parent / part
    lax.chmod(mode)

    with pytest.raises(ConfigError, match=rf"others may write {lax} .*: chmod go-w"):
        require_strict_modes(home / "key")


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
