"""A ledger's folder: a secret key, and a file that is sealed with it.

    FOLDER/key           32 random bytes, which never leave
    FOLDER/ledger.json   {"seal": HMAC of the content, "content": {...}}

The seal is no defence against the owner of the key. It shows a file that was edited, cut short
or put there from another folder, so that a budget is not begun anew by mistake.
"""

import hashlib
import hmac
import json
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock

from fedllm.atomic_files import sync_folder, write_atomic, write_synced
from fedllm.errors import PrivacyError
from fedllm.strict_modes import make_strict_folder

_KEY_FILE = "key"
_LEDGER_FILE = "ledger.json"
_OWNER_ONLY = 0o600


def simulated_folder(home: Path, run_id: int) -> Path:
    """Return the folder of all that the virtual nodes of a sealed simulation keep of a run.

    Args:
        home: fedllm's folder.
        run_id: Flower's id of the run when it began.
    """
    return home / "simulated" / str(run_id)


class SealedFolder:
    """A folder whose content one process at a time reads and writes.

    Guarantee:
        What was written is on disk, file and folder synced, before `write` returns. Content
        that was edited, cut short, taken from another folder or lost raises an error. Not
        covered: an owner who deletes the whole folder, or puts an older copy of it back.

    Args:
        folder: Made, with a fresh key, if there is none.
        empty: The content of a new one; its `format` is that of every later one.

    Attributes:
        is_new: Whether the folder was made just now.

    Raises:
        ConfigError: Another user may write its place.
        PrivacyError: The folder cannot be trusted or written.
    """

    def __init__(self, folder: Path, empty: Mapping[str, Any]) -> None:
        self._folder = folder
        self._path = folder / _LEDGER_FILE
        self._format = empty["format"]
        try:
            make_strict_folder(folder.parent)
            self._lock = FileLock(str(folder) + ".lock", mode=_OWNER_ONLY)
            with self._lock:
                self.is_new = not folder.exists()
                if self.is_new:
                    self._create(empty)
                self._key = self._read_key()
        except OSError as error:
            raise PrivacyError(
                f"{folder}: the ledger cannot be used: {error.strerror}; without it "
                "nothing may be released"
            ) from None

    @contextmanager
    def locked(self) -> Iterator[dict[str, Any]]:
        """Hold the lock, which ends with its process, and yield the content.

        Raises:
            PrivacyError: It is missing, or its seal does not match this folder's key.
        """
        with self._lock:
            yield self._read()

    def write(self, content: Mapping[str, Any]) -> None:
        """Write the content whole, so that it survives a power cut.

        Raises:
            PrivacyError: It cannot be written; the old content stays.
        """
        try:
            write_atomic(self._path, self._sealed(content), _OWNER_ONLY)
        except OSError as error:
            raise PrivacyError(
                f"{self._path}: cannot be written: {error.strerror}; nothing is released"
            ) from None

    def _create(self, empty: Mapping[str, Any]) -> None:
        """Make key and content together, never one without the other."""
        fresh = self._folder.with_name(f".{self._folder.name}-{secrets.token_hex(4)}")
        fresh.mkdir(mode=0o700)
        self._key = secrets.token_bytes(32)
        write_synced(fresh / _KEY_FILE, self._key, _OWNER_ONLY)
        write_synced(fresh / _LEDGER_FILE, self._sealed(empty), _OWNER_ONLY)
        fresh.rename(self._folder)
        sync_folder(self._folder.parent)

    def _read_key(self) -> bytes:
        try:
            key = (self._folder / _KEY_FILE).read_bytes()
        except FileNotFoundError:
            key = b""
        if len(key) != 32:
            raise self._damaged("its key is missing or damaged")
        return key

    def _read(self) -> dict[str, Any]:
        try:
            outer = json.loads(self._path.read_text("utf-8"))
            content, seal = outer["content"], outer["seal"]
            valid = isinstance(seal, str) and hmac.compare_digest(
                seal.encode(), self._seal(content).encode()
            )
        except OSError as error:
            raise self._damaged(f"{error.strerror}") from None
        except (ValueError, KeyError, TypeError):
            raise self._damaged("it is cut short or not a ledger") from None
        if not valid or content.get("format") != self._format:
            raise self._damaged("it was edited, or belongs to other data")
        return dict(content)

    def _sealed(self, content: Mapping[str, Any]) -> bytes:
        outer = {"seal": self._seal(content), "content": content}
        return json.dumps(outer, allow_nan=False).encode()

    def _seal(self, content: Mapping[str, Any]) -> str:
        """Return the keyed hash of the whole content."""
        text = json.dumps(content, sort_keys=True, separators=(",", ":"))
        return hmac.new(
            self._key, b"ledger" + text.encode(), hashlib.sha256
        ).hexdigest()

    def _damaged(self, why: str) -> PrivacyError:
        return PrivacyError(
            f"{self._path}: the ledger cannot be trusted: {why}. Put back the folder's "
            "last state; moving it away forgets what was spent"
        )
