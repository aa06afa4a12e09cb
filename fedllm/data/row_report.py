"""Lines about rows for the log of whom they belong to: what was read, and what not, and why.

Reasons quote no row, and a row is named by where it stands in its file.
"""

from collections.abc import Sequence

from fedllm.data.columns import LINE, Row
from fedllm.data.tokens import Tokenized

_MOST_LISTED = 50
_MOST_REASONS = 12


def row_lines(
    found: Tokenized, rows: Sequence[Row | None], max_length: int
) -> list[str]:
    """Return what became of rows.

    Args:
        found: The rows as tokens.
        rows: The rows, in the same order.
        max_length: `train.max-length`.
    """
    total = len(rows)
    lines = []
    shapes = sorted(found.columns.items(), key=lambda item: -item[1])
    for columns, count in shapes:
        lines.append(f"{count} of {total} rows are read as {' + '.join(columns)}")
    for what, places in (
        ("the end", found.truncated),
        ("the beginning of the question", found.cut_left),
    ):
        if places:
            lines.append(
                f"train.max-length {max_length} cut {what} of {len(places)} of {total} "
                f"rows: {listed(places, rows)}"
            )
    reasons = sorted(found.unusable.items(), key=lambda item: -len(item[1]))
    lines += [
        f"nothing is learned from {len(places)} of {total} rows: {reason}: "
        f"{listed(places, rows)}"
        for reason, places in reasons[:_MOST_REASONS]
    ]
    rest = sum(len(places) for _, places in reasons[_MOST_REASONS:])
    if rest:
        lines.append(f"nothing is learned from {rest} more rows, for other reasons")
    return lines


def listed(places: Sequence[int], rows: Sequence[Row | None]) -> str:
    """Return where rows stand, the first of them."""
    shown = ", ".join(_where(place, rows[place]) for place in places[:_MOST_LISTED])
    return shown + (", ..." if len(places) > _MOST_LISTED else "")


def why_unusable(found: Tokenized) -> str:
    """Return the reasons why rows are not usable, in one line; empty if all are."""
    reasons = sorted(found.unusable.items(), key=lambda item: -len(item[1]))
    return "; ".join(f"{len(places)}: {reason}" for reason, places in reasons[:5])


def _where(place: int, row: Row | None) -> str:
    """Return where a row stands in its file, or among the client's rows."""
    where = None if row is None else row.get(LINE)
    return f"row {place + 1}" if where is None else str(where)
