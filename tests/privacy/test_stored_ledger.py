"""A finished run's ledger is checked, whatever its unit."""

import json

import pytest

from fedllm.errors import PrivacyError
from fedllm.privacy.joint_ledger import JointLedger
from fedllm.privacy.ledger import Ledger, no_privacy
from fedllm.privacy.record_claims import RecordClaims
from fedllm.privacy.stored_ledger import check_ledger
from tests.privacy.test_chain import RECORD
from tests.privacy.test_joint_ledger import SETTINGS as JOINT
from tests.privacy.test_ledger import SETTINGS as CLIENT


def client(path):
    ledger = Ledger.create(path, CLIENT, "run")
    ledger.spend(1)
    ledger.spend(2)


def joint(path):
    ledger = JointLedger.create(path, JOINT, "run")
    ledger.spend(1)
    ledger.spend(2)


def claims(path):
    told = RecordClaims.create(path, RECORD, "run")
    told.note_round(1, {1: 2.0})
    told.note_round(2, {1: 3.0})


@pytest.mark.parametrize("write", [client, joint, claims])
def test_a_whole_ledger_has_its_chain_and_one_without_a_round_is_an_error(
    write, tmp_path
):
    path = tmp_path / "privacy.json"
    write(path)
    content = json.loads(path.read_text())
    assert check_ledger(path, content).head.rounds == 2
    del content["chain"][0]

    with pytest.raises(PrivacyError, match="does not follow"):
        check_ledger(path, content)


def test_a_run_without_privacy_has_no_chain(tmp_path):
    assert check_ledger(tmp_path, no_privacy(4, 100)) is None


@pytest.mark.parametrize(
    "content", [{}, {"unit": []}, {"unit": "record"}, {"unit": "client"}]
)
def test_what_is_no_ledger_is_one_line(content, tmp_path):
    with pytest.raises(PrivacyError, match="the ledger cannot be read"):
        check_ledger(tmp_path, content)


@pytest.mark.parametrize(
    "change",
    [
        {"epsilon": 10**400},
        {"releases": [float("inf")]},
        {"num_clients_reported": 10**12},
        {"num_clients_reported": -1},
    ],
)
def test_claims_with_impossible_numbers_are_one_line(change, tmp_path):
    path = tmp_path / "privacy.json"
    claims(path)
    content = json.loads(path.read_text()) | change

    with pytest.raises(PrivacyError, match="cannot be read") as caught:
        check_ledger(path, content)
    assert "\n" not in str(caught.value)
