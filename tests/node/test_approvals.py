"""A run is answered as its owner approved it: these settings, so often, so long."""

import time

import pytest

from fedllm.errors import NodeError
from fedllm.node import approvals
from fedllm.node.approvals import (
    DELIVERY,
    EACH,
    SAME_SETTINGS,
    Request,
    approve,
    approve_signed,
    differences,
    pending,
    revoke,
    take,
)
from fedllm.node.reviews import distrust, trust
from tests.helpers.reviewers import public_key, signed

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


def test_the_released_adapter_is_counted_apart_from_what_announced_the_run():
    approved()
    for kind in ("query", "query.other", DELIVERY, DELIVERY):
        take(ASKED, kind)
    for kind in ("query", DELIVERY):
        with pytest.raises(NodeError, match="2 rounds are used"):
            take(ASKED, kind)


def test_a_trustee_opens_every_round_that_was_approved():
    approved()
    for kind in ("query.hello", "query.tally", "query.tally"):
        take(ASKED, kind)
    with pytest.raises(NodeError, match="2 rounds are used"):
        take(ASKED, "query.tally")


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


def test_what_cannot_be_counted_is_not_answered(monkeypatch):
    approved()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(approvals, "write_atomic", full)
    with pytest.raises(NodeError, match="No space left .* cannot be counted"):
        take(ASKED, "train")


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


def test_what_a_trusted_reviewer_signed_is_answered_as_often_as_it_says(tmp_path):
    path = signed(tmp_path, ASKED)
    with pytest.raises(NodeError, match="no reviewer whom this node trusts"):
        approve_signed(path)
    trust(public_key(tmp_path))
    approve_signed(path)
    take(ASKED, "train")
    # Brought again, it allows no more; and no policy stretches it.
    approve_signed(path)
    take(ASKED, "train", SAME_SETTINGS)
    for policy in (EACH, SAME_SETTINGS):
        with pytest.raises(NodeError, match="2 rounds are used"):
            take(ASKED, "train", policy)
    assert approvals.approvals()[0].reviewer == "alice"


@pytest.mark.parametrize(
    "edited",
    [
        {"rounds": 3},
        {"rounds": "2"},
        {"expires": 2**40},
        {
            "request": {
                "app": "f" * 64,
                "settings": {**SETTINGS, "num-server-rounds": 3},
            }
        },
        {"request": {"app": "e" * 64, "settings": SETTINGS}},
        {"signature": "00" * 64},
        {"signature": ""},
    ],
)
def test_what_was_edited_after_the_signature_approves_nothing(tmp_path, edited):
    signed(tmp_path, ASKED)
    trust(public_key(tmp_path))
    with pytest.raises(NodeError, match="no reviewer whom|cannot be read as"):
        approve_signed(signed(tmp_path, ASKED, **edited))
    assert approvals.approvals() == []


def test_an_edit_on_the_nodes_own_disk_or_a_lost_trust_ends_a_signed_approval(tmp_path):
    path = signed(tmp_path, ASKED)
    trust(public_key(tmp_path))
    approve_signed(path)
    (kept,) = (approvals.node_folder() / "approvals").glob("*.json")
    whole = kept.read_text()
    kept.write_text(whole.replace('"rounds": 2', '"rounds": 200'))
    with pytest.raises(NodeError, match="no reviewer whom this node trusts"):
        take(ASKED, "train")
    kept.write_text(whole)
    take(ASKED, "train")
    distrust("alice")
    with pytest.raises(NodeError, match="no reviewer whom this node trusts"):
        take(ASKED, "train")
    # It waits for the owner, who may approve it without the reviewer.
    approve(ASKED.digest[:8], None, 30)
    take(ASKED, "train")


def test_a_signature_expires(tmp_path, monkeypatch):
    path = signed(tmp_path, ASKED)
    trust(public_key(tmp_path))
    approve_signed(path)
    later = time.time() + 31 * 86_400
    monkeypatch.setattr(approvals.time, "time", lambda: later)
    with pytest.raises(NodeError, match="has expired"):
        take(ASKED, "train")
    with pytest.raises(NodeError, match="has expired: ask the reviewer"):
        approve_signed(path)


@pytest.mark.parametrize(
    "content", ["{", "[]", "{}", '{"rounds": "2"}', '{"request": 5}', "\xff", "NaN"]
)
def test_a_file_that_is_no_approval_is_one_line(tmp_path, content):
    path = tmp_path / "file"
    path.write_text(content)
    with pytest.raises(NodeError, match="cannot be read as Approval") as caught:
        approve_signed(path)
    assert "\n" not in str(caught.value)
    with pytest.raises(NodeError, match="cannot be read as Request"):
        approvals.sign_request(path, None, 30, tmp_path / "key")
