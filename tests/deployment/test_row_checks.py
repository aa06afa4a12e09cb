"""What an owner is told of the node's rows, which is never what a row says."""

import json
from collections import Counter

import pytest

from fedllm.config_parsing import parse_run_config
from fedllm.deployment import row_checks as module
from fedllm.deployment.row_checks import row_checks
from fedllm.errors import ConfigError
from fedllm.models.known import BUILT_IN_MODEL

SECRET = "xylographometry"


class Finder:
    """In the place of the libraries: the secret is an identifier."""

    def __init__(self, country: str | None) -> None:
        if country == "XX":
            raise ConfigError("--country: one of DE")

    def count(self, text: str) -> Counter[str]:
        return Counter({"secret": text.count(SECRET)}) if SECRET in text else Counter()


@pytest.fixture
def look(tiny_llama, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "IdentifierFinder", Finder)

    def look(*rows: object, country: str | None = None, **settings: object):
        path = tmp_path / "rows.jsonl"
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        path.write_text("\n".join(lines) + "\n")
        config = parse_run_config({"model.name": str(tiny_llama), **settings})
        found = list(row_checks(path, config, country))
        assert SECRET not in "".join(map(str, found))
        return {check.name: check for check in found}

    return look


def row(question: str = "What is it?", answer: str = "A thing.", **more: object):
    return {"instruction": question, "response": answer, **more}


def test_rows_that_are_well_need_no_remedy(look):
    found = look(*(row(f"What is {number}?", id=number) for number in range(9)))

    assert [check.level for check in found.values()] == ["ok"] * 7
    assert found["columns"].text == "used: instruction, response; not used: id"
    assert found["rows"].text == "9 rows"
    assert "cuts the end of 0 and the whole answer of 0" in found["length"].text
    assert "no number of rows is too small" in found["minimum"].text
    assert found["identifiers"].text.startswith("none (names and postal")


def test_each_trouble_is_told_by_its_number_and_the_places_of_the_first_rows(look):
    good = [row(f"What is {number}?") for number in range(3)]
    found = look(
        *good, row(answer=" "), *good, *good, row(answer=f"Ask {SECRET} {SECRET}"), "{"
    )

    assert found["rows"].level == "FAIL"
    assert "malformed: 1 (row 12)" in found["rows"].text
    assert "no answer: 1 (row 4)" in found["rows"].text
    assert found["duplicates"].level == "warn"
    assert "6 rows are copies of earlier ones (row 5, 6, 7, 8, 9, ...)" in str(
        found["duplicates"]
    )
    assert found["identifiers"].level == "warn"
    assert "secret: 2 (row 11)" in found["identifiers"].text


def test_what_the_length_limit_cuts_and_what_it_loses_are_counted_apart(look):
    long = row("Why?", "because " * 60)
    lost = row("why " * 200, "Because.")
    found = look(row(), long, lost, **{"train.max-length": 200})

    assert found["length"].level == "warn"
    assert "cuts the end of 1 (row 2)" in found["length"].text
    assert "the whole answer of 1 (row 3)" in found["length"].text


@pytest.mark.parametrize(
    ("count", "level", "words"),
    [(7, "FAIL", "this client has 7"), (40, "ok", "40 rows for batches of 8: epsilon")],
)
def test_under_record_level_there_are_rows_enough_for_a_batch_or_no_promise(
    look, count, level, words
):
    rows = [row(f"What is {number}?") for number in range(count)]
    check = look(*rows, **{"privacy.unit": "record"})["minimum"]

    assert check.level == level and words in check.text


def test_malformed_rows_are_records_and_no_trouble_of_record_level(look):
    rows = [row(f"What is {number}?") for number in range(9)]
    assert look(*rows, "{", **{"privacy.unit": "record"})["rows"].level == "warn"


def test_what_cannot_be_looked_at_is_said_and_the_rest_goes_on(look):
    found = look(row(SECRET), country="XX", **{"model.name": "no/such-model"})

    assert found["length"].level == "note" and found["identifiers"].level == "note"
    assert "no/such-model is not on this machine" in found["length"].text
    assert "--country: one of DE" in found["identifiers"].text
    assert found["minimum"].level == "ok"


def test_the_built_in_model_is_not_fetched_for_its_tokenizer(
    look, monkeypatch, tmp_path
):
    monkeypatch.setenv("FEDLLM_HOME", str(tmp_path / "home"))
    check = look(row(), **{"model.name": BUILT_IN_MODEL.name})["length"]

    assert check.level == "note"
    assert f"{BUILT_IN_MODEL.name} is not on this machine" in check.text


def test_a_file_that_is_none_or_has_other_columns_fails(look, tmp_path):
    found = look({"question": "a", "answer\x1b": "b"})
    assert found["columns"].level == found["rows"].level == "FAIL"
    assert "no instruction, response" in found["columns"].text
    assert "answer\\x1b" in found["columns"].text
    (check,) = row_checks(tmp_path / "gone.jsonl", parse_run_config({}), None)
    assert check.level == "FAIL" and "no such file" in check.text


PERSONS = {"data.person-column": "who", "privacy.unit": "record", "train.batch-size": 1}


def test_persons_are_counted_and_the_noise_is_that_of_their_number(look):
    rows = [row(f"What is {n}?", who=n // 3) for n in range(9)]
    found = look(*rows, **PERSONS, **{"privacy.noise-multiplier": 1.0} | NO_TARGET)

    assert found["persons"].level == "ok"
    assert found["persons"].text == "3 persons by 'who', 3 rows at most"
    assert found["columns"].text.startswith("used: instruction, response, who")
    assert found["minimum"].text.startswith("3 persons for batches of 1")


NO_TARGET = {"privacy.target-epsilon": 0.0}


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([row()], "no row has the column 'who'; the columns are instruction, response"),
        ([row(who="a"), row(who=" "), "{"], "without an id: 2 rows (row 2, 3)"),
    ],
)
def test_rows_that_are_nobodys_are_refused_beforehand(look, rows, words):
    found = look(*rows, **PERSONS, **{"privacy.noise-multiplier": 1.0} | NO_TARGET)

    assert found["persons"].level == "FAIL"
    assert words in found["persons"].text


def test_ids_that_may_be_of_one_person_are_a_warning(look):
    people = [row(who=who) for who in ("P7", "p7", "007", 7, SECRET, "b")]
    found = look(*people, **PERSONS, **{"privacy.noise-multiplier": 1.0} | NO_TARGET)

    assert found["persons"].level == "warn"
    assert "4 ids differ from another in case" in found["persons"].text
    assert "(row 1, 2, 3, 4)" in found["persons"].text


def test_preferences_are_looked_at_as_both_answers(look):
    """The longest answer counts, also a rejected one, and whom it names."""
    pair = {
        "prompt": "Who?",
        "chosen": "I.",
        "rejected": f"You, {SECRET}, said I. " * 40,
    }

    found = look(pair, **{"train.objective": "dpo", "train.max-length": 200})

    assert "used: chosen, prompt, rejected" in found["columns"].text
    assert found["rows"].level == "ok"
    assert "200 at most" in found["length"].text
    assert "cuts the end of 1 (row 1)" in found["length"].text
    assert "secret: 40" in found["identifiers"].text


def test_answers_where_preferences_are_wanted_fail_by_their_columns(look):
    found = look({"prompt": "a", "response": "b"}, **{"train.objective": "dpo"})

    assert found["columns"].level == "FAIL"
    assert found["columns"].remedy == "dpo needs prompt, chosen, rejected"
