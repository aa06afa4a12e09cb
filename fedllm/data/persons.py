"""Whose row each one is: the rows of one person, by the column that names persons.

Two rows are one person's if their ids are equal after `person_id`. What makes too few
persons and what makes too many are both costly: two persons under one id, or one person
under two, have the bound of a group of two. So spelling that a change of format alters is
undone, and spelling that may tell two persons apart is kept.
"""

import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")

# What exports write for an empty cell. As an id it would make one person of all of them.
_MISSING = frozenset(("", "nan", "nat", "none", "null", "na", "n/a", "<na>"))
# A number of more bits is no id that another format would have written alike.
_LARGEST = 2**63
# Above, a float no longer tells one whole number from the next.
_LARGEST_FLOAT = 2**53


@dataclass(frozen=True)
class Persons:
    """The rows of each person.

    Attributes:
        places: The places of each person's rows, in order; persons by their first row.
        without_id: The places of the rows that are nobody's.
    """

    places: list[list[int]]
    without_id: list[int]

    def records(self, examples: Sequence[T | None]) -> list[tuple[T, ...] | None]:
        """Return a record for each person: all examples that can be learned from.

        Args:
            examples: One entry a row; None for a row without an example.

        Returns:
            One entry a person; None for a person without an example.

        Guarantee:
            An entry is a function of its person's rows alone, and a row without an id is
            in none.
        """
        found = (
            tuple(e for e in map(examples.__getitem__, places) if e is not None)
            for places in self.places
        )
        return [record or None for record in found]


def by_person(values: Iterable[object]) -> Persons:
    """Group rows by person. Total.

    Args:
        values: The cell of each row that names its person; anything.
    """
    places: dict[str, list[int]] = {}
    without_id: list[int] = []
    for place, value in enumerate(values):
        name = person_id(value)
        if name is None:
            without_id.append(place)
        else:
            places.setdefault(name, []).append(place)
    return Persons(list(places.values()), without_id)


def person_id(value: object) -> str | None:
    """Return the normal form of a person's id; None if a cell holds none. Total.

    Text in Unicode's form NFKC, without blanks at its ends. A whole number is its digits,
    as .csv has it: 17, 17.0 and "17" are one person. Case and leading zeros are kept, since
    they tell persons apart in some registers. Empty cells, what exports write for them
    ("nan", "null" and the like), and values that are neither text nor a whole number are
    no ids.

    Args:
        value: A cell.
    """
    if isinstance(value, bool):
        return None
    if isinstance(value, float):
        if not (value.is_integer() and abs(value) <= _LARGEST_FLOAT):
            return None
        value = int(value)
    if isinstance(value, int):
        return str(value) if abs(value) <= _LARGEST else None
    if not isinstance(value, str):
        return None
    text = unicodedata.normalize("NFKC", value).strip()
    return None if text.casefold() in _MISSING else text
