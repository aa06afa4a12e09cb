"""Whose row is it: ids, and the records that persons are."""

import math
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedllm.data.persons import by_person, person_id


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("17", 17),
        ("17", 17.0),
        ("p-17", "  p-17\t\n"),
        ("p17", "\uff5017"),  # full width
        ("Jos\u00e9", "Jose\u0301"),
        (0, -0.0),
    ],
)
def test_a_change_of_format_makes_no_new_person(one, other):
    assert person_id(one) == person_id(other) is not None


@pytest.mark.parametrize(
    ("one", "other"),
    [("17", "017"), ("aB3", "Ab3"), (1, -1), ("1 2", "12"), (2**53 - 1, 2**53)],
)
def test_what_may_tell_two_persons_apart_is_kept(one, other):
    assert person_id(one) != person_id(other)


NOBODY = [
    *(None, "", " \n", "NaN", "nan ", "null", "None", "N/A", "<NA>", "NaT"),
    *(True, False, 1.5, math.nan, math.inf, 2.0**60, 10**5000, [1], {"a": 1}),
    *(b"17", Decimal(17)),
]


@pytest.mark.parametrize("cell", NOBODY, ids=map(str, range(len(NOBODY))))
def test_a_cell_without_an_id_makes_no_person_of_all_such_rows(cell):
    assert person_id(cell) is None
    assert by_person([cell, "a", cell]).without_id == [0, 2]


CELLS = st.recursive(
    st.text() | st.none() | st.booleans() | st.integers() | st.floats(),
    lambda inner: st.lists(inner, max_size=2),
)


@given(cells=st.lists(CELLS | st.sampled_from(["a", "b", 1, 1.0, "1"])), more=CELLS)
def test_a_row_more_changes_its_own_person_alone_and_no_cell_raises(cells, more):
    """Half characters, too: st.text() of hypothesis has none, so they are added."""
    cells = [*cells, "\ud83d"]
    before, after = by_person(cells), by_person([*cells, more])
    rows = list(range(len(cells) + 1))

    held = [place for places in after.places for place in places]
    assert sorted(held + after.without_id) == rows
    changed = [p for p in after.places if p not in before.places]
    assert len(changed) == (person_id(more) is not None)
    assert all(len(cells) in places for places in changed)


def test_a_person_is_the_tuple_of_what_can_be_learned_from_their_rows():
    persons = by_person(["a", "b", "a", None, "c", "b"])

    records = persons.records(["1", None, "3", "nobody's", None, "6"])

    assert records == [("1", "3"), ("6",), None]
