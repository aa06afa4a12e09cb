"""Rows that a client holds out of its training: to report on, and for its personal adapter.

    >>> split_rows(RunConfig(), [{"instruction": "a", "response": "b"}]).training
    [0]

Whether a row is held out follows from its content and the seed alone; with
`data.person-column` from whose row it is, so that a person is on one side. So all copies of a
row, also another client's, are on one side, and stay there when a file changes between
rounds. Under record level this matters more: one row added or taken away changes the side of
no other, which a tenth by place, or an exact tenth, would not give. The share is therefore
an expected one; of a few rows possibly none is held out. Only where the unit is the client,
or nothing, may a client of few rows have two of them held out for its personal adapter.
"""

import hashlib
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from fedllm.config import PERSONAL_SHARE, RunConfig
from fedllm.data.columns import LINE, Row
from fedllm.data.persons import person_id

Part = Literal["training", "evaluation", "stopping", "choosing"]

_LEAST_ROWS = 4
"""Different rows of which two may be held out, whatever their digests are."""


@dataclass(frozen=True)
class RowSplit:
    """The places of a client's rows, by what they are for. Each is in one list only.

    Attributes:
        training: Train in the rounds, and the personal adapter.
        evaluation: Clients report the loss on these (`data.held-out-fraction`).
        stopping: End the training of the personal adapter.
        choosing: Choose between base, shared and personal; nothing else reads them.
    """

    training: list[int]
    evaluation: list[int]
    stopping: list[int]
    choosing: list[int]

    def places(self, part: Part) -> list[int]:
        """Return the places of one part."""
        places: list[int] = getattr(self, part)
        return places


def split_rows(config: RunConfig, rows: Collection[Row | None]) -> RowSplit:
    """Return which of a client's rows train, and which are held out for what.

    Args:
        config: Gives both shares and the seed.
        rows: One client's rows; None for one that cannot be read.

    Guarantee:
        Total. Under record level, whether a row is in `training` is a function of this row,
        or of its person's id, the shares and the seed. Copies of a row, and all rows of a
        person, are in one list.
    """
    reported = config.data.held_out_fraction
    held = reported + (PERSONAL_SHARE if config.is_personal else 0.0)
    if not held:
        return RowSplit(list(range(len(rows))), [], [], [])
    split = RowSplit([], [], [], [])
    places: dict[bytes, list[int]] = {}
    key = str(config.seed).encode()
    for place, row in enumerate(rows):
        digest = _keyed_digest(key, row, config.data.person_column)
        if digest is None:
            split.training.append(place)
        else:
            places.setdefault(digest, []).append(place)
    ordered = sorted(places)
    first, last = (
        sum(_share(d) < border for d in ordered) for border in (reported, held)
    )
    if config.is_personal and config.privacy.unit != "record":
        # Both halves need a row, and the rounds as many.
        is_enough = len(ordered) - first >= _LEAST_ROWS
        last = max(last, first + _LEAST_ROWS // 2) if is_enough else first
    for number, digest in enumerate(ordered):
        # One after the other, so that two different rows are enough for both halves.
        half = split.choosing if (number - first) % 2 else split.stopping
        part = split.training if number >= last else half
        part = split.evaluation if number < first else part
        part += places[digest]
    split.training.sort()
    return split


def _share(digest: bytes) -> float:
    """Return where a digest lies between the least and the largest, from 0 to 1."""
    return int.from_bytes(digest[:8], "big") / 2**64


def _keyed_digest(key: bytes, row: Row | None, column: str) -> bytes | None:
    """Return the digest that decides about a row; None for one that has none.

    All rows of a person have one, of the person's id alone.

    Under record level no row may end a client's part by what it holds, such as a whole
    number that no float can be.
    """
    try:
        if row is None:
            return None
        person = person_id(row.get(column)) if column else None
        if person is not None:
            return hashlib.sha256(key + b"person " + person.encode()).digest()
        return hashlib.sha256(key + _row_digest(row)).digest()
    except Exception:  # noqa: BLE001 - a row may hold anything
        return None


def _row_digest(row: Mapping[str, Any]) -> bytes:
    """Return the digest of a row: a hash of all its columns, in any order, but not its place.

    A missing value equals None, and 1 equals 1.0: reading a table fills and converts, so
    one row would change the digests of all others.
    """
    normalized = _without_the_table({k: v for k, v in row.items() if k != LINE})
    text = json.dumps(normalized, sort_keys=True, ensure_ascii=True, default=str)
    return hashlib.sha256(text.encode("ascii")).digest()


def _without_the_table(value: Any) -> Any:
    """Return a value without what it has only because of other rows."""
    if isinstance(value, Mapping):
        items = {key: _without_the_table(item) for key, item in value.items()}
        return {key: item for key, item in items.items() if item is not None}
    if isinstance(value, list | tuple):
        return [_without_the_table(item) for item in value]
    if isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    return value
