"""The objects that Flower's store would hold of a message."""

from typing import Any


def object_ids(sent: Any) -> set[str]:
    """Return the id of an object and of all below it: records, arrays, chunks."""
    ids = {sent.object_id}
    for child in (sent.children or {}).values():
        ids |= object_ids(child)
    return ids
