"""Who else may write a path: nobody, or what lies there cannot be trusted.

A ledger that another user edits has no limit, a key that another user puts there is no
name, and a model that another user changes is trained on. OpenSSH asks the same of a home
(`StrictModes`).
"""

import os
import stat
from pathlib import Path

from fedllm.errors import ConfigError

_MOST_LINKS = 40


def require_strict_modes(path: Path) -> None:
    """Check that nobody but this user and root can change what a path leads to.

    Every part of the path up to /, and every part of what a symbolic link on the way
    names, is owned by root or this user, and neither its group nor others may write it.
    A folder with the sticky bit, as /tmp, may be written: there nobody renames what
    another user owns. Parts that do not exist are left out.

    Args:
        path: A file or a folder; it need not exist.

    Raises:
        ConfigError: Names the part that another user owns or may write.
    """
    seen: set[Path] = set()
    _check(Path(os.path.abspath(path)), path, seen, _MOST_LINKS)


def _check(path: Path, wanted: Path, seen: set[Path], links_left: int) -> None:
    """Check each part of an absolute path from / on, through its links."""
    for part in (*reversed(path.parents), path):
        if part in seen:
            continue
        try:
            status = os.lstat(part)
        except OSError:
            # It is not there yet: check again once it has been made.
            return
        _check_part(part, wanted, status)
        if stat.S_ISLNK(status.st_mode):
            if not links_left:
                raise ConfigError(f"{wanted}: too many symbolic links: name its target")
            target = part.parent / os.readlink(part)
            # `..` counts from where a link leads, so it is not shortened here.
            _check(_resolved_parent(target), wanted, seen, links_left - 1)
        seen.add(part)


def _resolved_parent(target: Path) -> Path:
    """Return a link's target with its folder resolved, itself perhaps a link."""
    return Path(os.path.realpath(target.parent)) / target.name


def _check_part(part: Path, wanted: Path, status: os.stat_result) -> None:
    """Check one part of the path.

    Raises:
        ConfigError: Another user owns it or may write it.
    """
    if status.st_uid not in (0, os.geteuid()):
        raise ConfigError(
            f"{wanted}: user {status.st_uid} owns {part} and may replace what lies "
            "there: name a folder that only you can write"
        )
    mode = status.st_mode
    is_sticky = stat.S_ISDIR(mode) and mode & stat.S_ISVTX
    if stat.S_ISLNK(mode) or is_sticky:
        return
    if mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise ConfigError(
            f"{wanted}: others may write {part} (mode {stat.S_IMODE(mode):o}): "
            f"chmod go-w {part}"
        )
