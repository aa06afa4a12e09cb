"""A run is answered as its owner approved it: these settings, so often, so long."""

import time

import pytest

from fedllm.errors import NodeError
from fedllm.node import approvals
from fedllm.node.approvals import (
    EACH,
    SAME_SETTINGS,
    Request,
    approve,
    differences,
    pending,
    revoke,
    take,
)

SETTINGS = {"num-server-rounds": 2, "privacy.target-epsilon": 8.0, "data.name": "a"}
ASKED = Request("f" * 64, SETTINGS)


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDLLM_HOME", str(tmp_path / "home"))


def approved() -> None:
    with pytest.raises(NodeError, match="fedllm node approve"):
        take(ASKED, "train")
    approve(ASKED.digest[:8], None, 30)


def test_a_run_waits_until_it_is_approved_and_then_has_its_rounds_once():
    approved()
    assert pending() == []
    take(ASKED, "train")
    take(ASKED, "train.other")
    take(ASKED, "evaluate")
    with pytest.raises(NodeError, match="2 rounds are used"):
        take(ASKED, "train")
    assert pending() == [ASKED]


def test_the_same_settings_again_need_no_second_approval_until_it_expires(monkeypatch):
    with pytest.raises(NodeError, match="waits for"):
        take(ASKED, "train", SAME_SETTINGS)
    approve(ASKED.digest, None, 30)
    for _ in range(5):
        take(ASKED, "train", SAME_SETTINGS)
    with pytest.raises(NodeError, match="2 rounds are used"):
        take(ASKED, "train", EACH)
    with pytest.raises(NodeError, match="waits for"):
        take(Request("e" * 64, SETTINGS), "train", SAME_SETTINGS)
    with pytest.raises(NodeError, match="waits for"):
        take(Request(ASKED.app, {**SETTINGS, "seed": 1}), "train", SAME_SETTINGS)
    later = time.time() + 31 * 86_400
    monkeypatch.setattr(approvals.time, "time", lambda: later)
    with pytest.raises(NodeError, match="has expired"):
        take(ASKED, "train", SAME_SETTINGS)


@pytest.mark.parametrize("key", [*SETTINGS, "one.more"])
def test_changing_one_value_is_another_run(key):
    approved()
    other = Request(ASKED.app, {**SETTINGS, key: 3})

    with pytest.raises(NodeError, match="waits for"):
        take(other, "train")
    with pytest.raises(NodeError, match="waits for"):
        take(Request("e" * 64, SETTINGS), "train")
    assert differences(other, ASKED)[0].startswith(f"{key}: ")


def test_a_use_is_on_disk_before_the_client_begins_whatever_comes_after(monkeypatch):
    approved()
    real = approvals.write_atomic

    def crash_after(*words):
        real(*words)
        raise KeyboardInterrupt

    monkeypatch.setattr(approvals, "write_atomic", crash_after)
    with pytest.raises(KeyboardInterrupt):
        take(ASKED, "train")
    (approval,) = approvals.approvals()
    assert approval.used == {"train": 1}


def test_an_approval_expires_and_can_be_revoked(monkeypatch):
    approved()
    later = time.time() + 31 * 86_400
    with monkeypatch.context() as patch:
        patch.setattr(approvals.time, "time", lambda: later)
        with pytest.raises(NodeError, match="has expired"):
            take(ASKED, "train")
    revoke(ASKED.digest[:8])
    with pytest.raises(NodeError, match="waits for"):
        take(ASKED, "train")


def test_a_server_cannot_fill_the_disk_or_steer_the_terminal(monkeypatch):
    monkeypatch.setattr(approvals, "_MOST_REQUESTS", 3)
    for seed in range(5):
        with pytest.raises(NodeError):
            take(Request("f" * 64, {"seed": seed, "x\x1b[2K": "\x1b]0;\n"}), "train")
    assert len(pending()) == 3
    lines = differences(pending()[0], ASKED)
    assert all(line.isprintable() and line.isascii() for line in lines)
    with pytest.raises(NodeError, match="too many to be shown"):
        take(Request("f" * 64, {"x": "y" * 100_000}), "train")


def test_an_approval_that_was_edited_or_moved_allows_nothing():
    approved()
    (path,) = (approvals.node_folder() / "approvals").glob("*.json")
    path.write_text(path.read_text().replace("8.0", "80.0"))
    with pytest.raises(NodeError, match="was it edited"):
        take(ASKED, "train")
    path.write_text("{")
    with pytest.raises(NodeError, match="cannot be read"):
        take(ASKED, "train")
    with pytest.raises(NodeError, match="0 requests begin so"):
        approve("", None, 30)
