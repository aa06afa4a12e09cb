"""A client's error: a code leaves, its text only without privacy."""

import logging
from typing import Any

import pytest
import torch

from fedllm.client import failures, message_handler
from fedllm.errors import ConfigError, DataError, FedllmError, ModelError
from fedllm.wire.messages import (
    ERROR,
)
from tests.helpers.client_replies import (
    RECORD,
    WITHOUT_DP,
    code_of,
    text_of,
)
from tests.helpers.flower_objects import object_ids

SECRET = "patient-4711"


@pytest.mark.parametrize("unit", [{}, WITHOUT_DP, RECORD])
@pytest.mark.parametrize("error", [kind("x") for kind, _ in failures.CODES])
def test_two_failures_share_no_object(answer, monkeypatch, unit, error):
    def fail(*args: Any) -> None:
        raise error

    monkeypatch.setattr(message_handler, "_train", fail)
    one, two = answer(unit), answer(unit)

    assert ERROR in one.content and ERROR in two.content
    assert not object_ids(one.content) & object_ids(two.content)


ERRORS = [
    (ConfigError(SECRET), "bad-config"),
    (DataError(SECRET), "no-data"),
    (ModelError(SECRET), "failed"),
    (MemoryError(SECRET), "out-of-memory"),
    (torch.OutOfMemoryError(SECRET), "out-of-memory"),
    (RuntimeError(SECRET), "failed"),
    (KeyError(SECRET), "failed"),
    (RecursionError(SECRET), "failed"),
    (FedllmError(SECRET + "\udcff"), "failed"),
]


@pytest.mark.parametrize(("error", "code"), ERRORS)
def test_under_dp_every_error_becomes_a_code_and_its_text_stays_here(
    answer, home, monkeypatch, capfd, caplog, error, code
):
    def fail(*args: Any) -> None:
        raise error

    monkeypatch.setattr(message_handler, "_train", fail)
    with caplog.at_level(logging.DEBUG):
        reply = answer()

    assert code_of(reply) == code
    assert set(reply.content.config_records[ERROR]) == {"code", "nonce"}
    out, err = capfd.readouterr()
    assert SECRET not in out + err + caplog.text
    log = (home / "logs" / "client-0.log").read_text(errors="replace")
    assert f"code {code}" in log
    assert SECRET in log
    assert "Traceback" in log


@pytest.mark.parametrize(("error", "code"), ERRORS[:-1])
def test_without_dp_the_text_is_shown(answer, home, monkeypatch, error, code):
    def fail(*args: Any) -> None:
        raise error

    monkeypatch.setattr(message_handler, "_train", fail)
    reply = answer(WITHOUT_DP)

    assert code_of(reply) == code
    assert SECRET in text_of(reply)
    assert str(home / "logs" / "client-0.log") in text_of(reply)


def test_running_out_of_memory_on_a_cpu_has_the_code_of_an_accelerators(
    answer, monkeypatch
):
    def fail(*args: Any) -> None:
        torch.empty(2**60, dtype=torch.uint8)

    monkeypatch.setattr(message_handler, "_train", fail)

    assert code_of(answer()) == "out-of-memory"
