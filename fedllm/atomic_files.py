"""Files that are there whole or not at all, and survive a power cut."""

import errno
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

logger = logging.getLogger(__name__)


def write_synced(path: Path, data: bytes, mode: int = 0o666) -> None:
    """Write a file and wait until the disk has it.

    Args:
        path: The file; an old one is overwritten in place.
        data: Its content.
        mode: Permissions of a new file, less the umask.

    Raises:
        OSError: It cannot be written.
    """
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Wait until the disk knows what was renamed in a folder."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomic(path: Path, data: bytes, mode: int = 0o666) -> None:
    """Put a new file in the place of an old one: a crash leaves one or the other.

    Args:
        path: The file.
        data: Its content.
        mode: Permissions, less the umask.

    Raises:
        OSError: It cannot be written; then the old one is still there.
    """
    fresh = path.with_suffix(".tmp")
    write_synced(fresh, data, mode)
    fresh.replace(path)
    sync_folder(path.parent)


def create_once(
    folder: Path, make: Callable[[Path], None], *, private: bool = False
) -> Path:
    """Return `folder`, which exists only when `make` has filled it to the end.

    `make` fills a folder beside it, which is renamed at the end, so an interruption at
    any point leaves either nothing or the whole. Of several processes one makes it and
    the others wait; an operating system's lock ends with its process.

    Args:
        folder: What is wanted.
        make: Called with an empty folder on the same disk.
        private: Whether its owner alone may read it, whatever the umask.

    Raises:
        OSError: The place cannot be written to, or `make` raised it.
    """
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _locked(folder.parent / f".{folder.name}.lock"):
        if folder.is_dir():
            return folder
        prefix = f".{folder.name}.partial-"
        for leftover in folder.parent.glob(prefix + "*"):
            # Its maker was killed: a living one would hold the lock.
            shutil.rmtree(leftover, ignore_errors=True)
        partial = Path(tempfile.mkdtemp(prefix=prefix, dir=folder.parent))
        try:
            make(partial)
            _publish(partial, private)
            os.replace(partial, folder)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    return folder


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    lock = FileLock(path)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        logger.info("waiting: another process is making %s", path.parent)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _publish(folder: Path, private: bool) -> None:
    # mkdtemp and safetensors let only the owner read; a home may serve several users,
    # as where one of them builds a container's image and another runs it.
    for_folders, for_files = (0o700, 0o600) if private else (0o755, 0o644)
    folder.chmod(for_folders)
    for path in folder.rglob("*"):
        if path.is_dir():
            path.chmod(for_folders)
            continue
        path.chmod(for_files)
        # A rename may reach the disk before the contents of what it publishes.
        with path.open("rb") as file:
            os.fsync(file.fileno())


def is_disk_full(error: BaseException) -> bool:
    """Return whether a write failed because the disk is full, including safetensors' error."""
    number = getattr(error, "errno", None)
    return number in (errno.ENOSPC, errno.EDQUOT) or "os error 28" in str(error)
