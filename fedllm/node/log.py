"""What a node was asked and what it answered, in lines that hold each other.

    FEDLLM_HOME/node/node.log
    {"number": 1, "time": "...", "event": "asked", ..., "previous": "", "hash": "9f2c..."}

Each line holds the hash of the one before it, so a line that is edited or taken out shows.
A chain cannot show that its end is missing. Therefore the last hash, the head, is also
written elsewhere if FEDLLM_LOG_HEAD names a file, best on another disk.
"""

import hashlib
import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from fedllm.atomic_files import sync_folder, write_atomic
from fedllm.config import fedllm_home
from fedllm.errors import NodeError
from fedllm.strict_modes import make_strict_folder

LOG_HEAD = "FEDLLM_LOG_HEAD"
"""Variable that names the file which gets a copy of the head."""

_RESERVED = ("number", "time", "event", "previous", "hash")


@dataclass(frozen=True)
class Head:
    """The end of a log.

    Attributes:
        number: How many lines the log has.
        hash: Hash of the last one; empty if there is none.
    """

    number: int
    hash: str

    def __str__(self) -> str:
        return f"{self.number} {self.hash}"


def node_folder() -> Path:
    """Return the folder of what a node's owner keeps, made if need be.

    Raises:
        ConfigError: Others may write it.
        NodeError: It cannot be made.
    """
    folder = fedllm_home() / "node"
    try:
        make_strict_folder(folder)
    except OSError as error:
        raise NodeError(
            f"{folder}: cannot be made: {error.strerror}: set FEDLLM_HOME to a folder "
            "that can be written"
        ) from None
    return folder


def log_path() -> Path:
    """Return the path of the node's log."""
    return fedllm_home() / "node" / "node.log"


def append(event: str, **facts: Any) -> Head:
    """Add a line, and wait until the disk has it.

    For real nodes only: a simulated client has no owner who would read it.

    Args:
        event: What happened, in a word: `asked`, `spent`, `answered`.
        facts: More of it; whatever JSON can hold.

    Returns:
        The new end of the log.

    Raises:
        ConfigError: Others may write the log.
        NodeError: It cannot be written, or its last line is not a log's.
        ValueError: A fact has the name of a field that every line has.
    """
    if reserved := [name for name in facts if name in _RESERVED]:
        raise ValueError(f"{', '.join(reserved)}: every line has such a field")
    path = node_folder() / "node.log"
    try:
        with FileLock(path.with_suffix(".lock"), mode=0o600):
            head = _append_line(path, event, facts)
            if elsewhere := os.environ.get(LOG_HEAD):
                write_atomic(Path(elsewhere), f"{head}\n".encode(), 0o644)
    except OSError as error:
        raise NodeError(
            f"{error.filename or path}: cannot be written: {error.strerror}: nothing is "
            "answered that the node's log does not hold"
        ) from None
    return head


def _append_line(path: Path, event: str, facts: dict[str, Any]) -> Head:
    """Write one line behind the last whole one."""
    is_new = not path.exists()
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    with os.fdopen(descriptor, "r+b") as file:
        end, last = _last_whole_line(file.read())
        before = Head(0, "") if last is None else _head_of(path, last)
        line = {
            "number": before.number + 1,
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "event": event,
            **facts,
            "previous": before.hash,
        }
        line["hash"] = _hash(line)
        # A power cut may have left a part of a line, of which nothing was answered.
        file.truncate(end)
        file.seek(end)
        file.write(json.dumps(line).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())
    if is_new:
        sync_folder(path.parent)
    return Head(line["number"], line["hash"])


def _last_whole_line(content: bytes) -> tuple[int, bytes | None]:
    """Return where the last whole line ends, and the line."""
    end = content.rfind(b"\n") + 1
    if not end:
        return 0, None
    return end, content[content.rfind(b"\n", 0, end - 1) + 1 : end]


def _head_of(path: Path, line: bytes) -> Head:
    """Return a line's number and hash, after checking that it is whole.

    Raises:
        NodeError: It was edited.
    """
    try:
        content = json.loads(line)
        head = Head(int(content["number"]), str(content["hash"]))
        is_true = head.hash == _hash(content)
    except (ValueError, KeyError, TypeError):
        is_true = False
    if not is_true:
        raise NodeError(
            f"{path}: its last line was edited: move the file away and keep it; a new "
            "one begins with the next line"
        )
    return head


def _hash(line: dict[str, Any]) -> str:
    """Return the hash of all of a line but its hash."""
    rest = {name: value for name, value in line.items() if name != "hash"}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Read the lines of a log, each checked against the one before it.

    Raises:
        NodeError: The log cannot be read, or a line was edited, taken out or put in.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise NodeError(f"{path}: cannot be read: {error.strerror}") from None
    previous = ""
    for number, line in enumerate(content.splitlines(), 1):
        try:
            entry = json.loads(line)
            follows = entry["number"] == number and entry["previous"] == previous
            is_true = follows and entry["hash"] == _hash(entry)
        except (ValueError, KeyError, TypeError):
            is_true = False
        if not is_true:
            raise NodeError(
                f"{path}: line {number}: does not follow from the lines before it: it or "
                "one before it was edited or taken out"
            )
        previous = entry["hash"]
        yield entry


def check_log(path: Path, noted: str | None = None) -> Head:
    """Check a whole log.

    Args:
        path: The log.
        noted: A head of earlier, as it was written elsewhere: the hash, or the number
            and the hash. None: whether the log's end is there cannot be known.

    Returns:
        Its end.

    Raises:
        NodeError: It was edited, or lines that the noted head stands for are missing.
    """
    wanted = None if noted is None else noted.split()[-1] if noted.split() else ""
    head, is_there = Head(0, ""), wanted is None
    for entry in read_lines(path):
        head = Head(entry["number"], entry["hash"])
        is_there = is_there or head.hash == wanted
    if not is_there:
        raise NodeError(
            f"{path}: has {head.number} lines, and none is the head {noted!r}: lines at "
            "its end were taken out, or the log was begun anew"
        )
    return head
