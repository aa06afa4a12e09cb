"""What leaves of a client under record level, with its own noise and with joint noise."""

import json
import shutil
from typing import Any

import numpy as np
import pytest
from flwr.app import Message, RecordDict

from fedllm.wire.masking import WIRE
from fedllm.wire.messages import (
    ARRAYS,
    CONFIG,
    METRICS,
    own_config,
    read_declared_rows,
    read_sum,
)
from tests.helpers.client_replies import (
    JOINT,
    NODE,
    NUMBERS,
    RECORD,
    code_of,
    epsilon_of,
    values,
)
from tests.helpers.flower_messages import instruction
from tests.helpers.tiny_models import SENTENCES


def test_under_record_a_reply_holds_arrays_and_epsilon_and_nothing_else(answer, arrays):
    one, two = answer(RECORD), answer(RECORD, server_round=2)

    assert 0 < epsilon_of(one) < epsilon_of(two) <= 8.0
    got = values(one, arrays)
    assert max(np.abs(got[name] - arrays[name]).max() for name in got) > 0
    assert any((values(answer(RECORD), arrays)[n] != got[n]).any() for n in got)


def test_a_joint_reply_is_the_sum_in_integers_and_nothing_else(answer, arrays):
    # Two rows of two: every coin falls for its row.
    reply = answer(JOINT, **{**NUMBERS, "total_rows": 2})

    assert set(reply.content) == {ARRAYS, WIRE}
    read = read_sum(reply, {name: value.shape for name, value in arrays.items()})
    assert read.code is None
    assert any(value.any() for value in (read.arrays or {}).values())


@pytest.mark.parametrize("encoding", ["float32", "int8"])
def test_a_joint_reply_has_the_same_form_for_every_batch_and_every_file(
    answer, arrays, tmp_path, encoding
):
    """Also for an empty batch, and for a file in which nothing can be learned from."""

    def form(node: dict[str, Any], total_rows: int) -> Any:
        numbers = {**NUMBERS, "total_rows": total_rows}
        packed = {**JOINT, "wire.encoding": encoding}
        reply = answer(packed, node, encoding=encoding, **numbers)
        assert set(reply.content) == {ARRAYS, WIRE}
        sent = reply.content.array_records[ARRAYS]
        return [(name, a.dtype, a.shape, len(a.data)) for name, a in sent.items()]

    useless = tmp_path / "useless.jsonl"
    useless.write_text('{"instruction": ""}\nno JSON\n')
    usual = form(NODE, 2)

    assert [name for name, *_ in usual] == sorted(arrays)
    assert form({**NODE, "partition-id": 1}, 2**30) == usual
    assert form({"data-path": str(useless)}, 2) == usual


def test_the_rows_that_are_declared_are_the_owners_or_a_partitions(
    answer, data_file, limits
):
    def declared(node: dict[str, Any], changes: dict[str, Any] = JOINT) -> Message:
        content = RecordDict({CONFIG: own_config({})})
        return answer(changes, node, instruction(content, message_type="query"))

    own = {"data-path": str(data_file)}
    joint = {**limits, "privacy-noise": "joint"}

    assert read_declared_rows(declared(NODE)) == 5
    for more in ({}, joint):
        reply = declared({**own, **more, "declared-rows": 7})
        assert set(reply.content) == {METRICS, WIRE}
        assert read_declared_rows(reply) == 7
    for node in (own, {**NODE, **joint}, {**own, **limits, "declared-rows": 7}):
        assert code_of(declared(node)) == "bad-config"
    assert code_of(declared(NODE, RECORD)) == "bad-config"


BY_PERSON = {**RECORD, "data.person-column": "patient"}


@pytest.fixture
def persons(tmp_path, limits):
    """A node of a file in which two persons have five rows, and one row is nobody's."""

    def node(*patients: object, name: str = "own", **changes: Any) -> dict[str, Any]:
        path = tmp_path / f"{name}.jsonl"
        rows = [
            {"instruction": text[:20], "response": text[20:], "patient": patient}
            for text, patient in zip(SENTENCES, patients, strict=False)
        ]
        path.write_text("\n".join(json.dumps(row) for row in rows))
        own = {"data-path": str(path), "person-column": "patient", "partition-id": 0}
        return {**limits, **own, "declared-persons": 8, **changes}

    return node


def test_the_noise_is_that_of_the_persons_that_an_owner_declares(answer, persons, home):
    """Not of those in the file: a row decides whether a person is there."""
    spent = {}
    for name, patients in {
        "two": ("a", "a", "b", None, "a"),
        "five": ("a", "b", "c", "d", "e"),
        "nobody": (),
        "other": ("x", "x", "x", "x", "x"),
    }.items():
        node = persons(*(patients or [None] * 5), name=name)
        spent[name] = epsilon_of(answer(BY_PERSON, node))
        plans = json.loads((home / "ledgers/own/ledger.json").read_text())
        (plan,) = plans["content"]["plans"].values()
        assert plan["sampling_probability"] == 2 / 8
        shutil.rmtree(home / "ledgers")

    assert len(set(spent.values())) == 1
    assert code_of(answer(BY_PERSON, persons("a", **{"declared-persons": 1}))) == (
        "bad-config"
    )


def test_the_persons_that_are_declared_are_the_owners_or_a_partitions(
    answer, persons, data_file, tmp_path
):
    def declared(node: dict[str, Any], **more: Any) -> Message:
        content = RecordDict({CONFIG: own_config({})})
        changes = {**JOINT, "data.person-column": "patient", **more}
        return answer(changes, node, instruction(content, message_type="query"))

    node = persons("a", "a", "b", "b", "c", **{"privacy-noise": "joint"})
    assert read_declared_rows(declared({**node, "declared-rows": 5})) == 8
    own = node["data-path"]
    simulated = declared({**NODE, "num-partitions": 1}, **{"data.name": own})
    assert read_declared_rows(simulated) == 3


def test_what_a_client_trains_on_is_a_record_for_each_person(
    answer, persons, home, monkeypatch
):
    from fedllm.training import dp_sgd

    seen = []
    honest = dp_sgd.train_privately

    def watched(adapted: Any, records: Any, *rest: Any) -> Any:
        seen.append([len(record or ()) for record in records])
        return honest(adapted, records, *rest)

    monkeypatch.setattr(dp_sgd, "train_privately", watched)
    node = persons("a", "b", None, "a ", "", name="log")

    assert set(answer(BY_PERSON, node).content) == {ARRAYS, METRICS, WIRE}

    assert seen == [[2, 1]]
    (log,) = (home / "logs").rglob("*")
    text = log.read_text()
    assert (
        "2 persons by 'patient'; 2 of 5 rows name none and add nothing: row 3, 5"
        in (text)
    )


def test_a_column_that_the_file_lacks_is_a_line_of_the_log_and_no_other_reply(
    answer, persons, home
):
    node = persons("a", "b", name="lacks") | {"person-column": "person"}
    asked = {**BY_PERSON, "data.person-column": "person"}

    lacks = epsilon_of(answer(asked, node))
    shutil.rmtree(home / "ledgers")

    assert lacks == epsilon_of(answer(BY_PERSON, persons("a", "b", name="has")))
    (log,) = (home / "logs").rglob("*")
    assert "data.person-column: no row has the column 'person'" in log.read_text()


def test_a_changed_row_or_another_export_makes_no_new_person(answer, persons):
    """Every release counts against every person, so no edit begins a budget anew."""
    first = epsilon_of(answer(BY_PERSON, persons("a", "b", "c", name="first")))
    second = epsilon_of(answer(BY_PERSON, persons("A", "x", "c", name="second")))

    assert second > 1.1 * first


def test_rows_and_persons_are_not_spent_from_one_ledger(answer, persons, limits):
    node = persons("a", "b", "c", "d", name="both")
    rows = {k: v for k, v in node.items() if "person" not in k}
    epsilon_of(answer(RECORD, rows))

    assert code_of(answer(BY_PERSON, node)) == "bad-config"
    assert code_of(answer(RECORD, node)) == "bad-config"
