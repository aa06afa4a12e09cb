"""The hashes of a model's files: taken once, looked at before each load, and compared.

A folder of models may be shared by several owners' nodes, and a base that somebody changes
is trained on, or makes updates leak more. So each home keeps a manifest of the models that
it has used: whoever can write the models cannot write that. A file whose size and times are
known is not read again.
"""

import hashlib
import json
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from filelock import FileLock

from fedllm.atomic_files import write_atomic
from fedllm.errors import ModelError
from fedllm.strict_modes import make_strict_folder

logger = logging.getLogger(__name__)

QUANTISED_FOLDER = "quantised"
"""Folder of a home with the quantised copies of base models."""

_WEIGHTS = ".safetensors"
_SUFFIXES = {_WEIGHTS, ".json", ".model", ".jinja", ".tiktoken"}
_NAMES = {"merges.txt", "vocab.txt"}
_TEMPLATES = "additional_chat_templates"
_CONFIG = "config.json"
# What says nothing of the model, and differs between two versions of transformers.
_NOT_COMPARED = ("transformers_version", "_name_or_path")
_NOT_OF_TRAINING = "generation_config.json"


def folder_digest(folder: Path, home: Path) -> str:
    """Return the digest of a model folder: of its weights, configuration and tokenizer.

    Two folders of one model have the same, whichever version of transformers wrote the
    configuration.

    Raises:
        ModelError: A file cannot be read, or has changed since we made it.
    """
    hashes = file_hashes(folder, home)
    try:
        config = json.loads((folder / _CONFIG).read_text("utf-8"))
        kept = {k: v for k, v in config.items() if k not in _NOT_COMPARED}
    except (OSError, ValueError, AttributeError) as error:
        raise ModelError(f"{folder / _CONFIG}: cannot be read: {error}") from None
    weights = {n: h for n, h in hashes.items() if n.endswith(_WEIGHTS)}
    apart = {*weights, _CONFIG, _NOT_OF_TRAINING}
    others = {n: h for n, h in hashes.items() if n not in apart}
    parts = {"weights": weights, "config": kept, "tokenizer": others}
    return " ".join(f"{name} {_digest(part)}" for name, part in parts.items())


def file_hashes(folder: Path, home: Path) -> dict[str, str]:
    """Return the SHA-256 of each file of a model folder by its name, and remember them.

    Args:
        folder: The model.
        home: fedllm's folder, which keeps the manifest.

    Raises:
        ModelError: A file cannot be read; or the folder is one that we made, and has
            changed since then.
    """
    path = _manifest(folder, home)
    try:
        make_strict_folder(path.parent)
        with FileLock(path.with_suffix(".lock")):
            known = _read(path)
            found = _hashed(folder, known)
            if known and _is_ours(folder, home):
                _require_unchanged(folder, known, found, path)
            if found != known:
                write_atomic(path, json.dumps(found, indent=1).encode(), 0o600)
    except OSError as error:
        # A home that cannot be written remembers nothing: the files are hashed each time.
        logger.warning("the hashes of %s are not kept: %s", folder, error)
        found = _hashed(folder, {})
    return {name: entry["sha256"] for name, entry in found.items()}


def forget(folder: Path, home: Path) -> None:
    """Remove the manifest of a folder that was just made anew."""
    _manifest(folder, home).unlink(missing_ok=True)


def _manifest(folder: Path, home: Path) -> Path:
    place = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
    return home / "manifests" / f"{folder.name}-{place}.json"


def _is_ours(folder: Path, home: Path) -> bool:
    """Return whether we made a folder, so that nobody has a reason to change it."""
    made = {(home / name).resolve() for name in ("models", QUANTISED_FOLDER)}
    return folder.resolve().parent in made


def _read(path: Path) -> dict[str, dict[str, Any]]:
    try:
        content = json.loads(path.read_text("utf-8"))
        return {name: dict(entry) for name, entry in content.items()}
    except FileNotFoundError:
        return {}
    except (ValueError, AttributeError, TypeError):
        raise ModelError(
            f"{path}: is damaged: remove it, and the model is hashed again"
        ) from None


def _hashed(
    folder: Path, known: dict[str, dict[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Return size, times and hash of each file; a known one is not read again."""
    found = {}
    for path in sorted(_files(folder)):
        name = path.relative_to(folder).as_posix()
        status = path.stat()
        # A program that writes a file can set its modification time, but not its change time.
        state = [status.st_size, status.st_mtime_ns, status.st_ctime_ns]
        entry = known.get(name, {})
        if entry.get("state") != state or not isinstance(entry.get("sha256"), str):
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            entry = {"state": state, "sha256": digest}
        found[name] = entry
    return found


def _files(folder: Path) -> Iterable[Path]:
    """Yield the files that transformers may read of a model folder."""
    for path in [*folder.iterdir(), *folder.glob(f"{_TEMPLATES}/*")]:
        if path.is_file() and (path.suffix in _SUFFIXES or path.name in _NAMES):
            yield path


def _require_unchanged(
    folder: Path,
    known: dict[str, dict[str, Any]],
    found: dict[str, dict[str, Any]],
    manifest: Path,
) -> None:
    """Check that a folder that we made holds what it held.

    Raises:
        ModelError: Names the first file that was changed, added or removed.
    """
    for name in sorted({*known, *found}):
        then, now = (part.get(name, {}).get("sha256") for part in (known, found))
        if then != now:
            raise ModelError(
                f"{folder / name}: has changed since it was made (sha256 {now}, expected "
                f"{then}): another user may have written it; remove {folder}, and it is "
                f"made again; if you made it anew yourself, remove {manifest}"
            )


def _digest(part: dict[str, Any]) -> str:
    text = json.dumps(part, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]
