"""Who else may write a path: nobody, or what lies there cannot be trusted.

A ledger that another user edits has no limit, a key that another user puts there is no
name, and a model that another user changes is trained on. OpenSSH asks the same of a home
(`StrictModes`).
"""

import grp
import os
import pwd
import stat
from pathlib import Path

from fedllm.errors import ConfigError

_MOST_LINKS = 40


def make_strict_folder(folder: Path) -> None:
    """Make a folder for its owner alone, and check that nobody else can change it.

    Missing folders above it are made alike, whatever the umask. One that is there keeps
    its mode. The check comes last: below /tmp another user may have made it first.

    Raises:
        ConfigError: Another user owns a part of its path or may write it.
        OSError: It cannot be made.
    """
    for part in (*reversed(folder.parents), folder):
        if part == folder or not part.exists():
            part.mkdir(mode=0o700, exist_ok=True)
    require_strict_modes(folder)


def require_strict_modes(path: Path) -> None:
    """Check that nobody but this user and root can change what a path leads to.

    Every part of the path up to /, and every part of what a symbolic link on the way
    names, is owned by root or this user, and neither others nor its group may write it,
    but for a group that has no other member. A folder with the sticky bit, as /tmp, may be
    written: there nobody renames what another user owns. Parts that do not exist are left
    out.

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
    lax = stat.S_IWOTH if _is_own_group(status.st_gid) else stat.S_IWGRP | stat.S_IWOTH
    if mode & lax:
        raise ConfigError(
            f"{wanted}: others may write {part} (mode {stat.S_IMODE(mode):o}): "
            f"chmod go-w {part}"
        )


def _is_own_group(gid: int) -> bool:
    """Return whether a group is this user's own and has no other member.

    Many systems give each user one and the umask 002, and Kubernetes makes a volume writable
    for the group of its one user. A directory service may not list a group's members, so its
    name has to be the user's, unless it has none as in a container.
    """
    user = os.geteuid()
    if user == 0 or gid != os.getegid():
        return False
    users = pwd.getpwall()
    if any(other.pw_gid == gid and other.pw_uid != user for other in users):
        return False
    own = {entry.pw_name for entry in users if entry.pw_uid == user}
    try:
        group = grp.getgrgid(gid)
    except KeyError:
        return True
    return group.gr_name in own and own.issuperset(group.gr_mem)
