"""The audit asks a client about its rows, and convicts one whose answers tell."""

import json
import os

import pytest
from flwr.app import Message
from hypothesis import given, settings
from hypothesis import strategies as st

from fedllm.auditing import row_questions
from fedllm.auditing.row_questions import (
    NUM_ROWS,
    QUESTIONS,
    ROWS,
    TEMPLATES,
    ask_about_rows,
    reply_about,
)
from fedllm.auditing.toy_model import save_toy_model
from fedllm.client import cache
from fedllm.client.message_handler import reply_to
from fedllm.errors import DataError
from fedllm.wire.messages import error_content


def test_no_question_gets_an_answer_that_depends_on_a_row(monkeypatch):
    monkeypatch.setenv("FEDLLM_HOME", "as it was")

    findings = list(ask_about_rows(reply_to))

    assert [f.question for f in findings] == list(QUESTIONS)
    assert not [f.text for f in findings if not f.passed]
    assert all(rows == list(ROWS) for f in findings for rows in f.by_reply.values())
    # Some questions are answered by arrays and an epsilon, some by a code.
    assert len({reply.split(" ")[0] for f in findings for reply in f.by_reply}) == 2
    assert os.environ["FEDLLM_HOME"] == "as it was"


def usable_only(*args):
    return [example for example in honest(*args) if example is not None]


def refusing(*args):
    if None in (examples := honest(*args)):
        raise DataError("row 6: is not usable")
    return examples


honest = cache.client_records


@pytest.mark.parametrize("count", [usable_only, refusing])
def test_a_client_that_counts_usable_rows_is_convicted(monkeypatch, count):
    monkeypatch.setattr("fedllm.client.message_handler.client_records", count)
    few = ("ordinary", "with the word", "no answer", "no JSON")
    monkeypatch.setattr(row_questions, "ROWS", {row: ROWS[row] for row in few})

    findings = {f.question: f for f in ask_about_rows(reply_to)}

    # A joint sum is of no count of rows, and the number of persons is declared, so there a
    # client can only refuse.
    asked = {name: changes for name, (_, changes) in QUESTIONS.items()}
    counts = [
        f
        for name, f in findings.items()
        if "joint" not in name and "data.person-column" not in asked[name]
    ]
    assert len(counts) == 8 and not any(f.passed for f in counts)
    told = findings["a word, by failure"].by_reply.values()
    assert ["with the word", "no answer", "no JSON"] in told


def test_a_client_that_counts_the_persons_of_its_file_is_convicted(monkeypatch):
    few = ("ordinary", "of another person", "of no person")
    monkeypatch.setattr(row_questions, "ROWS", {row: ROWS[row] for row in few})
    asked = {"how many persons": QUESTIONS["how many persons"]}
    monkeypatch.setattr(row_questions, "QUESTIONS", asked)
    monkeypatch.setattr(
        "fedllm.client.record_steps.public_number", lambda client, records: len(records)
    )

    (finding,) = ask_about_rows(reply_to)

    assert not finding.passed
    assert ["ordinary", "of no person"] in finding.by_reply.values()


def test_a_client_that_refuses_everything_does_not_pass():
    def refuse(message: Message, context: object) -> Message:
        return Message(error_content("failed", None), reply_to=message)

    findings = {f.question: f for f in ask_about_rows(refuse)}

    assert not findings["which epsilon"].passed
    assert {"error {'code': 'failed'}, wire {'format': 2}"} == {
        r for f in findings.values() for r in f.by_reply
    }


TEXTS = st.text(st.characters(), max_size=20)  # half characters (surrogates), too
CELLS = st.recursive(
    TEXTS | st.none() | st.booleans() | st.integers() | st.floats(),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=5,
)
NAMES = st.sampled_from(["instruction", "response", "messages"])
ANY_ROW = st.dictionaries(NAMES | TEXTS, CELLS, max_size=4).map(
    lambda row: json.dumps(row).encode()
) | st.binary(min_size=1, max_size=40).map(
    # A line that is one line, and not blank.
    lambda text: b"x"
    + text.translate(None, b"\r\n")
)


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy") / "model"
    save_toy_model(folder, TEMPLATES["longer at a word"])
    return folder


@settings(max_examples=25, deadline=None)
@given(row=ANY_ROW)
def test_one_row_of_any_content_changes_nothing_but_the_values(toy, row):
    changes = {"train.batch-size": NUM_ROWS, "train.max-length": 64}

    assert reply_about(reply_to, toy, row, changes) == reply_about(
        reply_to, toy, ROWS["ordinary"], changes
    )
