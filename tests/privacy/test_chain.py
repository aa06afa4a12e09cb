"""The chain of a ledger's rounds: an edit shows, and a chain made anew has other heads."""

import json

import pytest

from fedllm.errors import PrivacyError
from fedllm.privacy.chain import Chain, Head, chain_fault
from fedllm.privacy.ledger import Ledger
from fedllm.privacy.record_claims import RecordClaims, RecordSettings
from fedllm.privacy.released_rounds import ReleasedRounds
from tests.privacy.test_ledger import SETTINGS

RECORD = RecordSettings(
    "record",
    "all",
    4,
    4,
    1.0,
    None,
    1e-5,
    8.0,
    0.0,
    num_trainable=100,
    planned_rounds=3,
)


def ledger_of(tmp_path, rounds=3) -> Ledger:
    ledger = Ledger.create(tmp_path / "privacy.json", SETTINGS, "run")
    for server_round in range(1, rounds + 1):
        ledger.spend(server_round)
    return ledger


def edited(ledger: Ledger, change) -> str:
    """Edit the file of a ledger, and return the error of its next reader."""
    content = json.loads(ledger._path.read_text())
    change(content)
    ledger._path.write_text(json.dumps(content))
    with pytest.raises(PrivacyError) as caught:
        Ledger.load(ledger._path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("position", [0, 1])
def test_a_round_that_is_taken_out_of_the_chain_shows(tmp_path, position):
    said = edited(ledger_of(tmp_path), lambda c: c["chain"].pop(position))

    assert "was edited: chain: its round" in said


def test_a_round_that_is_edited_or_put_in_shows(tmp_path):
    def put_in(content):
        content["chain"].insert(1, {"round": 7, "hash": "0" * 64})

    assert "round 2 does not follow" in edited(ledger_of(tmp_path), put_in)


def test_a_chain_and_releases_that_differ_show(tmp_path):
    assert "chain: its rounds are [1, 2]" in edited(
        ledger_of(tmp_path), lambda c: c["chain"].pop()
    )


def test_other_settings_or_another_name_break_the_whole_chain(tmp_path):
    links = ledger_of(tmp_path)._links

    assert Chain("run", SETTINGS, links).broken_at() is None
    assert Chain("other", SETTINGS, links).broken_at() == 1


def test_a_loaded_ledger_continues_its_chain(tmp_path):
    first = ledger_of(tmp_path, 2)
    second = Ledger.load(first._path)
    second.spend(3)

    assert second.head.rounds == 3
    assert [link["round"] for link in second._links] == [1, 2, 3]
    assert Ledger.load(first._path).head == second.head
    assert second._links[:2] == first._links


def test_a_chain_made_anew_without_a_round_has_none_of_the_heads_after_it(tmp_path):
    whole = ledger_of(tmp_path)
    (tmp_path / "anew").mkdir()
    anew = Ledger.create(tmp_path / "anew" / "privacy.json", SETTINGS, "run")
    anew.spend(1)
    anew.spend(3)

    assert chain_fault(anew._chain, anew.releases) is None
    heads = [Chain("run", SETTINGS, whole._links).head_at(n) for n in range(4)]
    assert [Chain("run", SETTINGS, anew._links).head_at(n) for n in (0, 1)] == heads[:2]
    assert anew.head.hash not in {head.hash for head in heads}


def test_a_round_of_another_copy_enters_the_chain_too(tmp_path):
    ledger = ledger_of(tmp_path, 1)
    released = ReleasedRounds(tmp_path, "run")
    released.begin()
    released.add(1, [])
    released.add(2, [1])

    assert ledger.follow(released) == [2]
    assert Ledger.load(ledger._path).head.rounds == 2


def test_a_round_that_cannot_be_written_is_not_in_the_chain(tmp_path, monkeypatch):
    ledger = ledger_of(tmp_path, 1)
    before = ledger.head

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fedllm.privacy.release_ledger.write_atomic", fail)
    with pytest.raises(PrivacyError):
        ledger.spend(2)
    assert ledger.head == before


def test_a_ledger_of_an_older_version_has_no_chain_and_begins_none(tmp_path):
    ledger = ledger_of(tmp_path, 1)
    content = json.loads(ledger._path.read_text())
    del content["chain"]
    ledger._path.write_text(json.dumps(content))

    old = Ledger.load(ledger._path)
    old.spend(2)

    assert old.head is None
    assert json.loads(ledger._path.read_text())["chain"] is None


def test_a_claim_of_clients_that_is_lowered_shows(tmp_path):
    path = tmp_path / "privacy.json"
    claims = RecordClaims.create(path, RECORD, "run")
    claims.note_round(1, {5: 2.0, 6: 3.0})
    claims.note_round(2, {5: 4.0})
    assert RecordClaims.load(path, RECORD).head == claims.head
    content = json.loads(path.read_text())
    content["chain"][1]["epsilon"] = 1.0
    path.write_text(json.dumps(content))

    with pytest.raises(PrivacyError, match="was edited: chain: its round 2"):
        RecordClaims.load(path, RECORD)


def test_an_epsilon_of_claims_that_is_not_the_chains_shows(tmp_path):
    path = tmp_path / "privacy.json"
    RecordClaims.create(path, RECORD, "run").note_round(1, {5: 2.0})
    content = json.loads(path.read_text()) | {"epsilon": 1.0}
    path.write_text(json.dumps(content))

    with pytest.raises(PrivacyError, match="epsilon is 1.0, and its chain has 2.0"):
        RecordClaims.load(path, RECORD)


@pytest.mark.parametrize("text", ["", "run", "run x 00", "run 1 00 ", "run -1 00"])
def test_what_is_no_head_is_none(text):
    assert Head.parse(text) is None


def test_a_head_is_read_as_it_was_written():
    head = Head("run", 12, "ab")

    assert Head.parse(str(head)) == head
