"""What a node keeps of a run after its last round, and what its reply gives away: nothing."""

import json
import stat
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedllm.adapters.files import read_base_name
from fedllm.client import delivery, message_handler
from fedllm.client.delivery import deliveries, read_trained
from fedllm.errors import ConfigError, NodeError
from fedllm.node.approvals import DELIVERY
from fedllm.wire.masking import WIRE
from fedllm.wire.messages import DELIVER
from tests.helpers.client_replies import LIMITS, NODE, RECORD, WITHOUT_DP, code_of
from tests.helpers.flower_messages import train_instruction

PERSONAL = {"personal.epochs": 2.0}


@pytest.fixture
def deliver(answer: Any):
    """Bring one client the adapter."""

    def ask(
        changes: dict[str, Any] | None = None, node: Any = NODE, **more: Any
    ) -> Any:
        changes = {**PERSONAL, **(changes or {})}
        return answer(changes, node, message_type=DELIVER, **more)

    return ask


def sizes(reply: Any) -> list[tuple[str, int]]:
    """Return the name and the size of every record of a reply."""
    return [(name, len(record.deflate())) for name, record in reply.content.items()]


def test_the_name_of_the_message_is_one_on_both_sides():
    assert DELIVER == DELIVERY


@pytest.mark.parametrize("changes", [{}, WITHOUT_DP, RECORD])
def test_the_released_adapter_is_kept_for_its_owner_alone(
    changes, deliver, arrays, home, tiny_llama
):
    deliver(changes)
    reply = deliver(changes, {**NODE, "partition-id": 1})

    assert set(reply.content) == {WIRE}
    folder = home / "personal" / "1" / "client-1"
    assert {path.name for path in folder.iterdir()} == {"delivered.json", "shared"}
    for path in (folder, *folder.rglob("*")):
        mode = stat.S_IMODE(path.stat().st_mode)
        assert mode == (0o700 if path.is_dir() else 0o600), path
    assert read_base_name(folder / "shared") == str(tiny_llama)
    kept = read_trained(folder / "shared")
    assert set(kept) == set(arrays)
    assert all(np.array_equal(kept[name], arrays[name]) for name in arrays)
    assert [d.node.partition_id for d in deliveries()] == [0, 1]
    assert deliveries("1/client-1")[0].folder == folder
    assert deliveries("2") == []


@pytest.mark.parametrize("encoding", ["float16", "int8"])
def test_the_adapter_travels_in_the_run_s_encoding(encoding, answer, arrays):
    given = {name: value + 1 for name, value in arrays.items()}
    message = train_instruction(given, message_type=DELIVER, encoding=encoding)
    answer({**PERSONAL, "wire.encoding": encoding}, message=message)

    kept = read_trained(deliveries()[0].folder / "shared")
    assert set(kept) == set(given)
    for name, value in given.items():
        np.testing.assert_allclose(kept[name], value, atol=0.02)


@pytest.mark.parametrize("unit", [{}, RECORD])
def test_the_reply_is_the_same_whatever_the_rows_hold_and_no_row_is_read(
    unit, deliver, tmp_path, monkeypatch, run_config
):
    def read(*args: Any, **more: Any) -> Any:
        raise AssertionError("a row was read")

    monkeypatch.setattr(message_handler, "client_rows", read)
    monkeypatch.setattr(message_handler, "client_records", read)
    few, broken, many = (tmp_path / f"{name}.jsonl" for name in ("few", "bad", "many"))
    row = json.dumps({"instruction": "a", "response": "b"})
    few.write_text(row)
    broken.write_text("no JSON")
    many.write_text("\n".join([row] * 1000))

    replies = [
        deliver(unit, {"data-path": str(path)})
        for path in (few, broken, many, tmp_path / "missing.jsonl")
    ]

    assert {frozenset(reply.content) for reply in replies} == {frozenset({WIRE})}
    assert len({tuple(sizes(reply)) for reply in replies}) == 1
    wires = [dict(reply.content.config_records[WIRE]) for reply in replies]
    for wire in wires:
        assert set(wire) == {"format", "nonce"}
    assert len({wire["nonce"] for wire in wires}) == len(wires)


def test_under_record_level_a_delivery_counts_as_no_refusal(deliver, home):
    """It reads no row: a client takes part in the run as long as before."""
    codes = [code_of(deliver({**RECORD, "personal.epochs": 0.0})) for _ in range(5)]

    assert set(codes) == {"bad-config"}
    assert not (home / "refusals").exists()


def test_a_run_without_personal_training_leaves_nothing(deliver, home):
    reply = deliver({"personal.epochs": 0.0})

    assert code_of(reply) == "bad-config"
    assert not (home / "personal").exists()


def test_the_limits_of_the_node_s_owner_hold_for_a_delivery_too(deliver, home, limits):
    reply = deliver({}, {**NODE, **limits})

    assert LIMITS["privacy-unit"] == "record"
    assert code_of(reply) == "bad-config"
    assert not (home / "personal").exists()


def test_arrays_of_another_adapter_are_not_kept(answer, arrays, home):
    foreign = {name: value[:1] for name, value in arrays.items()}
    message = train_instruction(foreign, message_type=DELIVER)
    reply = answer(PERSONAL, message=message)

    assert code_of(reply) == "failed"
    assert not list((home / "personal").glob("*/client-*"))


def test_of_one_run_the_first_delivery_is_kept(deliver, arrays, answer):
    deliver()
    other = {name: value + 1 for name, value in arrays.items()}
    answer(PERSONAL, message=train_instruction(other, message_type=DELIVER))

    kept = read_trained(deliveries()[0].folder / "shared")
    assert all(np.array_equal(kept[name], arrays[name]) for name in arrays)


def test_a_failure_while_it_is_written_leaves_no_half_of_it(deliver, home, monkeypatch):
    monkeypatch.setattr(delivery, "_ABOUT", "no/such/folder/delivered.json")
    assert code_of(deliver()) == "failed"
    run = home / "personal" / "1"
    assert [path.name for path in run.iterdir() if path.is_dir()] == []


def test_a_relative_path_of_the_node_s_rows_means_the_same_later(
    deliver, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    deliver({}, {"data-path": "rows.jsonl"})

    assert deliveries()[0].node.data_path == str(tmp_path / "rows.jsonl")


def test_a_delivery_that_others_may_write_names_no_rows_to_train_on(deliver, home):
    deliver()
    path: Path = deliveries()[0].folder / "delivered.json"
    path.chmod(0o666)
    with pytest.raises(ConfigError, match="others may write"):
        deliveries()


@pytest.mark.parametrize("text", ["", "{}", '{"run_id": 2}'])
def test_a_damaged_delivery_is_one_line(text, deliver):
    deliver()
    path = deliveries()[0].folder / "delivered.json"
    path.write_text(text)
    with pytest.raises(NodeError, match="cannot be read as a delivery") as caught:
        deliveries()
    assert "\n" not in str(caught.value)


def test_a_delivery_that_was_moved_is_not_another_client_s(deliver):
    deliver()
    folder = deliveries()[0].folder
    folder.rename(folder.with_name("client-9"))
    with pytest.raises(NodeError, match="was it moved"):
        deliveries()


def test_damaged_values_are_one_line(deliver):
    deliver()
    folder = deliveries()[0].folder / "shared"
    (folder / "trained.safetensors").write_bytes(b"x")
    with pytest.raises(NodeError, match=r"trained\.safetensors: cannot be read"):
        read_trained(folder)
