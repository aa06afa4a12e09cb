"""Which rows train and which are held out: by their content and the seed alone."""

from dataclasses import replace
from itertools import chain
from typing import Any

import pytest

from fedllm.config import DataConfig, PersonalConfig, PrivacyConfig, RunConfig
from fedllm.data.held_out import RowSplit, split_rows

PERSONAL = RunConfig(seed=1, personal=PersonalConfig(epochs=1.0))
REPORTED = RunConfig(seed=1, data=DataConfig(held_out_fraction=0.25))
BOTH = replace(PERSONAL, data=REPORTED.data)
RECORD = PrivacyConfig(unit="record")


def questions(count: int) -> list[dict[str, Any]]:
    return [{"instruction": f"q{i}", "response": "a"} for i in range(count)]


def parts(split: RowSplit) -> list[list[int]]:
    return [split.training, split.evaluation, split.stopping, split.choosing]


def test_held_out_rows_are_a_fixed_share_and_copies_of_a_row_are_on_one_side():
    rows = questions(1000)
    twice = [*rows, *rows[::-1]]

    def texts(data: Any, seed: int, part: str) -> list[str]:
        split = split_rows(replace(REPORTED, seed=seed), data)
        return [data[i]["instruction"] for i in getattr(split, part)]

    train, held = texts(twice, 1, "training"), texts(twice, 1, "evaluation")
    assert not set(train) & set(held)
    assert len(train) + len(held) == 2000
    # 250 of 1,000 coins: 5 standard deviations are 69.
    assert 181 < len(set(held)) < 319
    first = {f"q{i}" for i in range(500)}
    assert set(texts(rows[:500], 1, "evaluation")) == set(held) & first
    assert set(texts(twice, 2, "evaluation")) != set(held)


def test_without_a_share_every_row_is_trained_on_and_none_is_looked_at():
    class Unread(list[dict[str, Any]]):
        def __iter__(self) -> Any:
            raise AssertionError("a row was looked at")

    rows = Unread(questions(3))
    assert parts(split_rows(RunConfig(), rows)) == [[0, 1, 2], [], [], []]


def test_the_personal_tenth_is_halved_and_no_row_is_for_two_purposes():
    rows = questions(1000)
    split, both = split_rows(PERSONAL, rows), split_rows(BOTH, rows)

    held = len(split.stopping) + len(split.choosing)
    # 100 of 1,000 coins: 5 standard deviations are 47.
    assert 53 < held < 147 and not split.evaluation
    assert abs(len(split.stopping) - len(split.choosing)) <= 1
    # A round reports on other rows than those that choose afterwards.
    assert both.evaluation == split_rows(REPORTED, rows).evaluation
    assert 53 < len(both.stopping) + len(both.choosing) < 147
    for chosen in (split, both):
        assert sorted(chain(*parts(chosen))) == list(range(1000))


def test_copies_of_a_row_are_in_one_half():
    rows = questions(200)
    twice = [*rows, *rows[::-1]]
    split = split_rows(PERSONAL, twice)

    def texts(places: list[int]) -> set[str]:
        return {twice[i]["instruction"] for i in places}

    assert split.stopping and split.choosing
    assert not texts(split.stopping) & texts(split.choosing)


@pytest.mark.parametrize("count", range(4, 40))
def test_a_client_of_few_rows_has_two_held_out_unless_the_unit_is_a_row(count):
    split = split_rows(PERSONAL, questions(count))

    assert split.stopping and split.choosing
    assert len(split.training) >= count / 2
    assert split.training == sorted(split.training)
    by_row = split_rows(replace(PERSONAL, privacy=RECORD), questions(count))
    assert {*by_row.training} >= {*split.training}


def test_too_few_rows_all_train():
    assert split_rows(PERSONAL, [*questions(3), *questions(3)]).training == list(
        range(6)
    )


@pytest.mark.parametrize("place", [0, 57, 199])
@pytest.mark.parametrize("count", [12, 200])
def test_at_record_level_a_row_taken_away_changes_the_side_of_no_other(place, count):
    rows, place = questions(count), place % count
    less = rows[:place] + rows[place + 1 :]

    def training(data: list[dict[str, Any]]) -> set[str]:
        config = replace(PERSONAL, privacy=RECORD)
        return {data[i]["instruction"] for i in split_rows(config, data).training}

    assert training(less) == training(rows) - {f"q{place}"}


def test_a_row_that_has_no_digest_trains_and_ends_nothing():
    rows = [None, {"instruction": 10**400}, {"instruction": {1: "a", "b": 2}}]
    assert split_rows(PERSONAL, rows).training == [0, 1, 2]


@pytest.mark.parametrize("privacy", [PrivacyConfig(), RECORD])
def test_a_person_is_on_one_side_whatever_a_row_of_theirs_holds(privacy):
    column = replace(PERSONAL.data, person_column="patient")
    config = replace(PERSONAL, data=column, privacy=privacy)
    # Of the rows of person 0 the id is a number in half.
    rows = [
        {**row, "patient": str(i % 300) if i % 2 else i % 300}
        for i, row in enumerate(questions(900))
    ]
    sides = parts(split_rows(config, rows))

    persons = [{i % 300 for i in side} for side in sides]
    assert all(len(side) == 3 * len(p) for side, p in zip(sides, persons, strict=True))
    assert 8 < len(persons[2] | persons[3]) < 52
    changed = [{**row, "response": "other"} for row in rows]
    assert parts(split_rows(config, changed)) == sides
    nobody = [*rows, {"instruction": "q", "response": "a"}]
    assert sum(map(len, parts(split_rows(config, nobody)))) == 901
