"""A log of which no line can be edited or lost unseen."""

import json
import multiprocessing
import os

import pytest

from fedllm.errors import ConfigError, NodeError
from fedllm.node import log
from fedllm.node.log import append, check_log, log_path, read_lines


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDLLM_HOME", str(tmp_path / "home"))
    monkeypatch.delenv(log.LOG_HEAD, raising=False)


@pytest.fixture
def lines() -> list[str]:
    append("asked", run_id=2**63, superlink="a:9192")
    append("spent", epsilon=0.25)
    append("answered", code="not-approved\x1b[2K\n", num_bytes=0)
    return log_path().read_text().splitlines()


def write(lines: list[str]) -> None:
    log_path().write_text("".join(f"{line}\n" for line in lines))


def test_lines_keep_their_facts_in_order_and_only_their_owner_reads_them(lines):
    entries = list(read_lines(log_path()))

    assert [entry["event"] for entry in entries] == ["asked", "spent", "answered"]
    assert entries[0]["run_id"] == 2**63 and entries[1]["epsilon"] == 0.25
    assert check_log(log_path()).number == len(lines) == 3
    assert log_path().stat().st_mode & 0o777 == 0o600
    assert log_path().parent.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("number", [1, 2, 3])
def test_an_edited_line_is_found(lines, number):
    edited = json.loads(lines[number - 1]) | {"event": "other"}
    write([*lines[: number - 1], json.dumps(edited), *lines[number:]])

    with pytest.raises(NodeError, match=f"line {number}: does not follow"):
        check_log(log_path())


def test_an_edited_line_with_its_own_hash_mended_is_found(lines):
    edited = json.loads(lines[0]) | {"run_id": 1}
    edited["hash"] = log._hash(edited)
    write([json.dumps(edited), *lines[1:]])

    with pytest.raises(NodeError, match="line 2: does not follow"):
        check_log(log_path())


@pytest.mark.parametrize("taken_out", [0, 1])
def test_a_line_that_was_taken_out_of_the_middle_is_found(lines, taken_out):
    write([line for number, line in enumerate(lines) if number != taken_out])

    with pytest.raises(NodeError, match="does not follow"):
        check_log(log_path())


def test_a_missing_end_is_found_with_the_head_that_was_written_elsewhere(
    lines, tmp_path, monkeypatch
):
    elsewhere = tmp_path / "head"
    monkeypatch.setenv(log.LOG_HEAD, str(elsewhere))
    append("asked", run_id=8)
    noted = elsewhere.read_text()
    assert check_log(log_path(), noted).number == 4
    append("asked", run_id=9)
    assert check_log(log_path(), noted).number == 5
    write(lines)

    assert check_log(log_path()).number == 3
    with pytest.raises(NodeError, match="lines at its end were taken out"):
        check_log(log_path(), noted)
    with pytest.raises(NodeError, match="lines at its end were taken out"):
        check_log(log_path(), "")


def test_the_part_of_a_line_that_a_power_cut_left_is_replaced(lines):
    with log_path().open("a") as file:
        file.write('{"number": 4, "ev')

    assert append("asked").number == 4
    assert check_log(log_path()).number == 4


def test_nothing_is_added_to_an_edited_end(lines):
    write([*lines[:2], lines[2].replace("answered", "unasked")])

    with pytest.raises(NodeError, match="its last line was edited"):
        append("asked")


def _append_ten(name: str) -> None:
    for number in range(10):
        append(name, count=number)


def test_processes_that_write_at_once_make_one_chain():
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_append_ten, args=(name,)) for name in "ab"]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()

    assert check_log(log_path()).number == 20


def test_a_log_that_others_may_write_is_not_written(lines):
    log_path().parent.chmod(0o777)

    with pytest.raises(ConfigError, match="chmod go-w"):
        append("asked")


def test_a_log_that_cannot_be_written_is_an_error(monkeypatch):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(NodeError, match="No space left on device: nothing is answered"):
        append("asked")


def test_a_fact_may_not_stand_for_the_chain():
    with pytest.raises(ValueError, match="hash: every line has such a field"):
        append("asked", hash="0")
