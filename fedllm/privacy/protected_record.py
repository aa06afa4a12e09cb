"""What one record is, in words: a row, or all rows of one person in one client."""

NOT_BY_PERSON = ["a person with several rows: the bound is for one row"]
"""What is not covered if a record is a row."""


def relation(person_column: str) -> str:
    """Return the neighbouring relation.

    Args:
        person_column: `data.person-column`; empty: a record is a row.
    """
    if not person_column:
        return "add-or-remove one record"
    return "add-or-remove one record, all rows of one person in one client"


def protected(person_column: str) -> str:
    """Return what was there or not, in a sentence."""
    if not person_column:
        return "one training record of a client"
    return f"all training rows of one person in one client (by {person_column!r})"


def persons_not_covered(person_column: str) -> list[str]:
    """Return what the unit itself leaves out; arguments as in `relation`."""
    if not person_column:
        return list(NOT_BY_PERSON)
    return [
        "a person at several clients: each client has a record of its own of them, so the bound "
        "is that of a group (epsilon_two_clients is that of two)",
        f"whether {person_column!r} names persons: one person under two ids, or two under one, "
        "has the bound of a group of two",
        "a person named in the rows of another, or of nobody (rows without an id train nothing)",
        "the number of persons that each node's owner declared: a public number, which a person "
        "who joins or leaves does not change",
    ]
