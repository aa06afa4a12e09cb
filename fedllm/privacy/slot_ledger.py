"""The slots that a client has answered in sealed rounds, each at most once.

Two updates of one client in one slot would be opened under one noise, at twice the sensitivity:
that costs four times what its ledger counts for one, and not twice. So a slot is answered
once, and its numbers only go up.
"""

from pathlib import Path

from fedllm.errors import BudgetError
from fedllm.privacy.sealed_folder import SealedFolder

_EMPTY = {"format": 1, "slots": {}}


class SlotLedger:
    """The last slot that was answered, of each run.

    Guarantee:
        A slot is on disk, synced, before `spend` returns, and no slot is spent twice, nor one
        before it. Not covered: an owner who deletes the folder or puts an older copy back.

    Args:
        folder: Made if there is none.

    Raises:
        ConfigError: Another user may write its place.
        PrivacyError: The ledger cannot be trusted or written.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = SealedFolder(folder, _EMPTY)

    def spend(self, run: str, slot: int) -> None:
        """Enter a slot.

        Args:
            run: Name of the run, and of the client in it.
            slot: Its number.

        Raises:
            BudgetError: It was answered, or a later one was; nothing was entered.
            PrivacyError: The ledger cannot be trusted or written.
        """
        with self._folder.locked() as content:
            last = content["slots"].get(run, 0)
            if slot <= last:
                raise BudgetError(
                    f"run {run}: slot {slot}: slot {last} was answered, and none is answered "
                    "twice: two updates under one noise would cost more than they are "
                    "charged"
                )
            slots = {**content["slots"], run: slot}
            self._folder.write({**content, "slots": slots})
