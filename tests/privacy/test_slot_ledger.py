"""A slot is answered once, and its numbers only go up."""

import pytest

from fedllm.errors import BudgetError, PrivacyError
from fedllm.privacy.slot_ledger import SlotLedger


def test_a_slot_is_spent_once_and_never_an_earlier_one(tmp_path):
    ledger = SlotLedger(tmp_path / "slots")

    ledger.spend("run", 1)
    ledger.spend("run", 3)
    ledger.spend("another", 1)

    for slot in (1, 2, 3):
        # By another process, as every message is.
        with pytest.raises(BudgetError, match="slot 3 was answered"):
            SlotLedger(tmp_path / "slots").spend("run", slot)
    ledger.spend("run", 4)


def test_an_edited_ledger_answers_nothing(tmp_path):
    SlotLedger(tmp_path / "slots").spend("run", 2)
    path = tmp_path / "slots" / "ledger.json"
    path.write_text(path.read_text().replace("2", "1"))

    with pytest.raises(PrivacyError, match="cannot be trusted"):
        SlotLedger(tmp_path / "slots").spend("run", 2)
