"""The folder of a run, written so that a crash loses nothing."""

import contextlib
import json
import math
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy.typing as npt
from filelock import FileLock, Timeout

from fedllm.adapters.files import save_adapter
from fedllm.adapters.spec import AdapterSpec
from fedllm.atomic_files import is_disk_full, write_atomic
from fedllm.errors import FederationError, FedllmError
from fedllm.strict_modes import make_strict_folder, require_strict_modes

CONFIG_FILE = "config.json"
METRICS_FILE = "metrics.jsonl"
PRIVACY_FILE = "privacy.json"
RESULT_FILE = "result.json"


class RunDirectory:
    """The folder of one run.

    Attributes:
        path: Absolute path of the folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = FileLock(path / ".lock", thread_local=False)

    @classmethod
    def create(cls, home: Path, run_id: int) -> "RunDirectory":
        """Make `runs/<time>_<run id>/` and point `runs/latest` at it.

        Only its owner can read it.

        Raises:
            ConfigError: Another user may write its place.
            FederationError: The disk is full or the folder cannot be written.
        """
        stamp = time.strftime("%Y-%m-%d_%H-%M-%S")
        path = home / "runs" / f"{stamp}_{run_id}"
        with _disk_errors(path):
            make_strict_folder(path.parent)
            count = 1
            # Each run has a name of its own, even if two start in the same second, and
            # if the folder of one is gone, whose released rounds are still known.
            while path.exists() or (home / "released" / f"{path.name}.json").exists():
                count += 1
                path = path.with_name(f"{stamp}_{run_id}-{count}")
            # The ledger shows which clients were asked, and the adapter is not published yet.
            path.mkdir(mode=0o700)
        directory = cls(path)
        directory.link_as_latest()
        return directory

    def link_as_latest(self) -> None:
        """Point the link `latest` beside this folder at it."""
        fresh = self.path.parent / f".latest-{self.path.name}"
        with _disk_errors(fresh):
            fresh.unlink(missing_ok=True)
            fresh.symlink_to(self.path.name, target_is_directory=True)
            fresh.replace(self.path.parent / "latest")

    def lock(self) -> None:
        """Lock this folder against runs in other processes, until this one ends.

        Raises:
            ConfigError: Another user may write the folder, so its ledger proves nothing.
            FederationError: Another run holds the lock.
        """
        require_strict_modes(self.path)
        with _disk_errors(self.path):
            try:
                self._lock.acquire(blocking=False)
            except Timeout:
                raise FederationError(
                    f"{self.path}: another run is at work in this folder; wait for it, "
                    "or stop it (flwr stop)"
                ) from None

    def unlock(self) -> None:
        """Release the lock."""
        self._lock.release()

    def roll_back(self, server_round: int) -> None:
        """Remove the files of later rounds and those that a crash left half-written.

        Args:
            server_round: The last round to keep.
        """
        metrics = self.path / METRICS_FILE
        with _disk_errors(self.path):
            kept = [
                line
                for line in metrics.read_text("utf-8").splitlines()
                if 0 <= _round_of(line) <= server_round
            ]
            write_atomic(metrics, "".join(f"{line}\n" for line in kept).encode())
            for path in self.path.glob("peft_*"):
                number = path.name.removeprefix("peft_")
                if not number.isdigit() or int(number) > server_round:
                    shutil.rmtree(path)
            for path in self.path.glob(".peft_*"):
                shutil.rmtree(path)
            for path in self.path.glob("*.tmp"):
                path.unlink()

    def write_json(self, name: str, content: Mapping[str, Any]) -> None:
        """Write a JSON file, whole or not at all; infinite and NaN values become null."""
        text = json.dumps(_finite(content), indent=2, allow_nan=False) + "\n"
        self.write_file(name, text.encode())

    def write_file(self, name: str, data: bytes) -> None:
        """Replace a file: a crash leaves the old or the new one."""
        target = self.path / name
        with _disk_errors(target):
            write_atomic(target, data)

    def add_metrics(self, line: Mapping[str, Any]) -> None:
        """Append one round to metrics.jsonl; infinite and NaN values become null."""
        target = self.path / METRICS_FILE
        text = json.dumps(_finite(line), allow_nan=False) + "\n"
        with _disk_errors(target), target.open("a", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())

    def save_round(
        self,
        server_round: int,
        spec: AdapterSpec,
        arrays: Mapping[str, npt.NDArray[Any]],
        base_name: str,
        origin: Mapping[str, Any],
    ) -> Path:
        """Write `peft_<round>/`, whole or not at all, and return its path."""
        target = self.path / f"peft_{server_round}"
        fresh = self.path / f".peft_{server_round}"
        with _disk_errors(target):
            about = {**origin, "server_round": server_round}
            save_adapter(fresh, spec, arrays, base_name, about)
            shutil.rmtree(target, ignore_errors=True)
            fresh.replace(target)
        return target

    def copy_adapter(self, server_round: int, name: str) -> Path:
        """Make `peft_best` or `peft_final` a copy of a saved round."""
        target = self.path / name
        with _disk_errors(target):
            fresh = self.path / f".{name}"
            shutil.rmtree(fresh, ignore_errors=True)
            shutil.copytree(self.path / f"peft_{server_round}", fresh)
            shutil.rmtree(target, ignore_errors=True)
            fresh.replace(target)
        return target

    def drop_round(self, server_round: int) -> None:
        """Remove a saved round that need not be kept."""
        shutil.rmtree(self.path / f"peft_{server_round}", ignore_errors=True)


def read_json(path: Path) -> dict[str, Any]:
    """Read a file that `RunDirectory` wrote.

    Raises:
        FedllmError: It is missing or not JSON.
    """
    try:
        content = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise FedllmError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise FedllmError(f"{path}: is damaged: not JSON") from None
    if not isinstance(content, dict):
        raise FedllmError(f"{path}: is damaged: not an object")
    return content


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read the lines of metrics.jsonl.

    Raises:
        FedllmError: It is missing, or a line is not a round.
    """
    try:
        lines = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    except OSError as error:
        raise FedllmError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError:
        raise FedllmError(f"{path}: is damaged: not JSON") from None
    for line in lines:
        if not isinstance(line, dict) or type(line.get("server_round")) is not int:
            raise FedllmError(f"{path}: is damaged: a line without a server_round")
    return lines


@contextlib.contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    """Raise the errors of a full or read-only disk as one line with a remedy."""
    try:
        yield
    except Exception as error:
        # safetensors has an error of its own for a failed write.
        if is_disk_full(error):
            raise FederationError(
                f"{path}: no space left on the disk: free some, or set FEDLLM_HOME to a "
                "folder on another disk"
            ) from None
        if not isinstance(error, OSError):
            raise
        raise FederationError(
            f"{path}: cannot be written: {error.strerror}; set FEDLLM_HOME to a folder "
            "that can"
        ) from None


def _round_of(line: str) -> int:
    """Return the round of a line of metrics.jsonl; -1 if a crash cut it short."""
    try:
        return int(json.loads(line)["server_round"])
    except (ValueError, KeyError, TypeError):
        return -1


def _finite(value: Any) -> Any:
    """Replace infinite and NaN values, which JSON cannot hold, by None."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
