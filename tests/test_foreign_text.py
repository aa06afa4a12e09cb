"""A stranger's text can be seen, is short, and is never taken for a line of our own."""

import json
import logging

import pytest
from flwr.app import ConfigRecord, Error, RecordDict
from hypothesis import example, given
from hypothesis import strategies as st

from fedllm.commands import runs
from fedllm.commands.options import error_text
from fedllm.config_parsing import parse_run_config
from fedllm.errors import DataError
from fedllm.foreign_text import FOREIGN_TEXT_LIMIT, printable
from fedllm.logs import _Plain
from fedllm.runs.checkpoint import State, _read_state
from fedllm.runs.state import RunState, read_state
from fedllm.server.round_log import log_failures
from fedllm.strategy.round_stats import Round
from fedllm.wire.messages import ERROR, read_reply
from tests.helpers.federations import NO_PRIVACY
from tests.helpers.flower_messages import reply

# Escapes that rub out the line above, a forged line, a right-to-left mark, separators.
FORGED = (
    "\x1b[1A\x1b[2K\x1b]0;owned\x07\rround 5/5\nprivacy: epsilon 0.01\x9b2J\u202e"
    "\u2028\u2029\x85\u200b\ufeff\ud800\U000e0001\u3164"
)
ANYTHING = st.text(st.characters(), max_size=400)


@given(ANYTHING)
@example(FORGED)
def test_whatever_a_stranger_writes_can_be_seen_on_one_line(text):
    shown = printable(text)

    assert shown.isprintable() and len(shown.splitlines()) <= 1
    assert len(shown) <= FOREIGN_TEXT_LIMIT
    assert printable(shown) == shown


@pytest.mark.parametrize("first", range(0, 0x110000, 0x22000))
def test_every_code_point_alone_is_shown_or_escaped(first):
    for code in range(first, first + 0x22000):
        shown = printable(chr(code))
        assert shown.isprintable() and shown
        assert shown == chr(code) or shown.startswith("\\")


@pytest.mark.parametrize(
    "code", [0x34F, 0x115F, 0x17B4, 0x180B, 0x3164, 0xFE0F, 0xFFA0, 0xE0100, 0xE01EF]
)
def test_what_is_printable_and_yet_shows_nothing_is_escaped(code):
    # Python calls most of them printable; no terminal draws one.
    assert printable(f"a{chr(code)}b").startswith("a\\")


def test_words_of_any_language_stay_as_they_are():
    for text in (
        "no rows left",
        "données déjà lues",
        "数据不足",
        "данных нет",
        "\\x1b",
    ):
        assert printable(text) == text
    assert printable("\x1b\u202e\U000e0001") == "\\x1b\\u202e\\U000e0001"
    assert printable("x" * 301) == "x" * 297 + "..."
    assert printable("a\nb\r", keep="\n") == "a\nb\\x0d"


def error_reply(text):
    return RecordDict({ERROR: ConfigRecord({"code": "failed", "text": text})})


@given(ANYTHING)
@example(FORGED)
def test_a_clients_words_are_one_printable_line_of_the_log(text):
    lines = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(_Plain().format(record))
    logger = logging.getLogger("fedllm.server.round_log")
    logger.addHandler(handler)
    try:
        for content in (error_reply(text), Error(1, text)):
            answer = read_reply(reply(content), {})
            stats = Round(asked=1, answered=1)
            stats.rejected.append((5, answer.code, answer.text))
            log_failures(parse_run_config(NO_PRIVACY), 1, stats)
            assert answer.text.isprintable() and len(answer.text) <= FOREIGN_TEXT_LIMIT
    finally:
        logger.removeHandler(handler)

    assert len(lines) == 2
    assert all(line.isprintable() for line in lines)


def test_a_log_line_and_an_error_are_printable_whatever_path_they_name():
    record = logging.LogRecord("fedllm", logging.INFO, "", 0, "%s", (FORGED,), None)

    assert _Plain().format(record).isprintable()
    assert all(x.isprintable() for x in error_text(DataError(FORGED)).split("\n"))


def test_a_run_folder_from_elsewhere_adds_no_line_of_its_own(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("FEDLLM_HOME", str(tmp_path))
    name = "2026-01-01_00-00-00_1" + FORGED.replace("\ud800", "")
    folder = tmp_path / "runs" / name
    folder.mkdir(parents=True)
    RunState(folder).fail(FORGED)

    # Escaped in the file, which others read too, and on reading, for files of others.
    assert json.loads((folder / "state.json").read_text())["reason"].isprintable()
    assert read_state(folder, finished=False)[1].isprintable()
    for arguments, expected in (([], 2), ([name], 5)):
        runs.main(arguments)
        lines = capsys.readouterr().out.split("\n")[:-1]
        assert len(lines) == expected
        assert all(line.isprintable() for line in lines)


def test_a_state_that_a_stranger_wrote_is_read_as_printable_text(tmp_path):
    (tmp_path / "state.json").write_text(
        '{"state": "failed", "reason": "\\u001b[2K\\nprivacy: epsilon 0.01"}'
    )

    assert (
        read_state(tmp_path, finished=False)[1] == "\\x1b[2K\\x0aprivacy: epsilon 0.01"
    )


def test_the_reasons_of_failures_in_a_checkpoint_are_read_as_printable_text():
    state = dict.fromkeys(State.__dataclass_fields__)
    state["failures"] = {FORGED: 2}

    (reason,) = _read_state(json.dumps(state)).failures
    assert reason.isprintable()
