"""Rows that train and rows that are declared public: no row may be both.

The loss on a public row is printed, and chooses a round, without noise, and the server trains
on public rows without noise. Of a row of a client's either would be a release that nothing
pays for. A row is known by the text of its
conversation: another column, or a blank at an end, makes no other row of it.
"""

import hashlib
import json
import unicodedata
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from fedllm.config import DataConfig, RunConfig
from fedllm.data.columns import Row
from fedllm.data.conversations import Conversation
from fedllm.data.embedded import EMBEDDED
from fedllm.data.preferences import Preference
from fedllm.data.readers import looks_local
from fedllm.data.records import load_records
from fedllm.data.rows import load_public
from fedllm.data.shapes import PlainText, read_row
from fedllm.errors import ConfigError

_Split = Literal["train", "validation", "test"]
_KEYS: dict[_Split, str] = {
    "train": "data.public-train",
    "validation": "data.public-validation",
    "test": "data.public-test",
}


def require_no_public_row_trains(config: RunConfig) -> None:
    """Check that no training row that is known here is declared public too.

    Rows of a hub, and of a file that is not on this machine, are not looked at: those are
    the clients' own.

    Raises:
        ConfigError: A row is in both.
        DataError: Public rows, or training rows that are here, cannot be read.
    """
    if config.privacy.unit == "none" or not _is_here(config.data):
        return
    public = {split: load_public(config.data, split) for split in _KEYS}
    if not any(public.values()):
        return
    training = _digests(config.data, load_records(config.data))
    for split, key in _KEYS.items():
        rows = public[split]
        both = 0 if rows is None else len(_digests(config.data, rows) & training)
        if both:
            raise ConfigError(
                f"{key}: {both} of its rows also train (data.name is "
                f"{config.data.name}): what they say would leave without noise under "
                f"privacy.unit={config.privacy.unit!r}; take them out of one of the two"
            )


def require_public_rows_apart(config: RunConfig) -> None:
    """Check that the server trains on no row that chooses a round or reports.

    Raises:
        ConfigError: A row is in both.
        DataError: Public rows cannot be read.
    """
    rows = load_public(config.data, "train")
    if rows is None:
        return
    training = _digests(config.data, rows)
    scoring: tuple[_Split, ...] = ("validation", "test")
    for split in scoring:
        scored = load_public(config.data, split) or ()
        if both := len(_digests(config.data, scored) & training):
            raise ConfigError(
                f"data.public-train: {both} of its rows are {split} rows too "
                f"({_KEYS[split]}), whose losses would then mean nothing; take them out "
                "of one of the two"
            )


def judged_by_embedded(config: DataConfig) -> bool:
    """Return whether public rows that come with this package judge a run."""
    return config.name in EMBEDDED and not (
        config.public_validation and config.public_test
    )


def public_rows_among(config: DataConfig, rows: Iterable[Row | None]) -> set[int]:
    """Return the places of a node's own rows that come with this package as public ones.

    A node trains on none of them. Which rows the server's own files declare public it
    does not know, and it opens no path that a run config names.

    Args:
        config: Names the data set, and the files that take the place of its public rows.
        rows: The node's rows; None for one that cannot be read.
    """
    if config.name not in EMBEDDED:
        return set()
    named: dict[_Split, str] = {
        "validation": config.public_validation,
        "test": config.public_test,
    }
    public: set[bytes] = set()
    for split, path in named.items():
        if not path:
            public |= _digests(config, load_public(config, split) or ())
    return {
        i for i, row in enumerate(rows) if conversation_digest(config, row) in public
    }


def _is_here(config: DataConfig) -> bool:
    """Return whether this machine has the training rows that `data.name` names."""
    if config.name in EMBEDDED:
        return True
    return looks_local(config.name) and Path(config.name).expanduser().exists()


def _digests(config: DataConfig, rows: Iterable[Row | None]) -> set[bytes]:
    found = {conversation_digest(config, row) for row in rows}
    return {digest for digest in found if digest is not None}


def conversation_digest(config: DataConfig, row: Row | None) -> bytes | None:
    """Return the digest of what is learned from a row; None if nothing is. Total."""
    try:
        content = None if row is None else read_row(config, row)
    except Exception:  # noqa: BLE001 - a row may hold anything
        return None
    if content is None:
        return None
    if isinstance(content, PlainText):
        known: list[Any] = ["text", _plain(content.text)]
    elif isinstance(content, Preference):
        known = ["preference", _said(content.chosen), _said(content.rejected)]
    else:
        known = _said(content)
    # Text may hold half a character, which no encoding takes: JSON escapes it.
    return hashlib.sha256(json.dumps(known, default=str).encode("ascii")).digest()


def _said(content: Conversation) -> list[Any]:
    """Return the turns of a conversation, without what makes no difference."""
    known: list[Any] = [
        (turn["role"], _plain(turn["content"])) for turn in content.turns
    ]
    known += [turn["tool_calls"] for turn in content.turns if "tool_calls" in turn]
    return known


def _plain(text: str) -> str:
    return unicodedata.normalize("NFC", text).strip()
