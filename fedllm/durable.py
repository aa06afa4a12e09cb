"""Files that are there whole or not at all, and survive a power cut."""

import os
from pathlib import Path


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


def replace_whole(path: Path, data: bytes, mode: int = 0o666) -> None:
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
