"""A trustee: it opens a round's pads once, with its noise in the answer.

    FEDLLM_HOME/trustees/NAME/       a sealed folder
        ledger.json                  of each run: its key, when that ends, the last slot

Keys and slots are in one file: who loses it has lost the keys too, and opens nothing twice.
"""

import os
import stat
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import load_ssh_private_key

from fedllm.errors import BudgetError, ConfigError, PrivacyError
from fedllm.privacy.agreement import Certificate, SlotSettings
from fedllm.privacy.mechanism import SecureGenerator
from fedllm.privacy.pads import Residues, SealingKey, add_pad, residues
from fedllm.privacy.sealed_folder import SealedFolder
from fedllm.strict_modes import require_strict_modes

_EMPTY: Mapping[str, Any] = {"format": 1, "runs": {}}
_KEY_SECONDS = 30 * 86_400
"""How long a key of a run lives; a run that is resumed later has other trustees' keys."""


@dataclass(frozen=True)
class Tally:
    """A trustee's answer.

    Attributes:
        vector: (d,) the sum of its pads less its noise; None: nothing was opened, and the
            slot is not spent.
        unopened: Places in the list of the packets that do not open.
    """

    vector: Residues | None
    unopened: tuple[int, ...] = ()


class Trustee:
    """Answers each slot of a run at most once.

    Guarantee:
        The one vector of a slot has every pad of the list once, and fresh noise D(s) of the
        settings in each value, whatever the server asks. The slot is on disk, synced, before
        the vector is made. What is answered otherwise depends on no update: which packets
        open is known to who sealed them. Not covered: the folder put back to an older state,
        which answers a slot twice.

    Args:
        name: As the nodes' owners know it.
        identity: Its own key, which they pinned.
        folder: Of its ledger; made if there is none.

    Raises:
        ConfigError: Another user may write its place.
        PrivacyError: The ledger cannot be trusted or written.
    """

    def __init__(self, name: str, identity: Ed25519PrivateKey, folder: Path) -> None:
        self.name = name
        self._identity = identity
        self._folder = SealedFolder(folder, _EMPTY)
        self._generator = SecureGenerator()

    def certificate(self, run: str, post_quantum: bool) -> Certificate:
        """Return this trustee's key of a run, signed; made if there is none yet.

        Args:
            run: Name of the run.
            post_quantum: Whether the key is hybrid.

        Raises:
            PrivacyError: The ledger cannot be trusted or written.
        """
        now = int(time.time())
        with self._folder.locked() as content:
            runs = _without_old_keys(content["runs"], now)
            entry = runs.get(run, {"key": "", "expires": 0, "slot": 0})
            key = SealingKey(bytes.fromhex(entry["key"]))
            if not entry["key"] or key.is_hybrid != post_quantum:
                key = SealingKey.generate(post_quantum)
                entry = {**entry, "key": key.raw.hex(), "expires": now + _KEY_SECONDS}
            self._folder.write({**content, "runs": {**runs, run: entry}})
        unsigned = Certificate(run, self.name, key.public.hex(), entry["expires"])
        return unsigned.signed_by(self._identity)

    def tally(self, settings: SlotSettings, packets: Sequence[bytes]) -> Tally:
        """Open the packets of a slot, and return the sum of their pads less noise, once.

        Args:
            settings: Of the slot.
            packets: One of each client whose update is in the sum.

        Raises:
            BudgetError: The slot, or a later one, was answered.
            PrivacyError: The settings do not name this trustee's key of the run, packets or
                seeds are equal, or the ledger cannot be trusted or written.
        """
        _require_list(settings, packets)
        with self._folder.locked() as content:
            runs = _without_old_keys(content["runs"], int(time.time()))
            entry = runs.get(settings.run, {"key": "", "slot": 0})
            if not entry["key"]:
                raise PrivacyError(
                    f"trustee {self.name}: has no key of run {settings.run!r}, or not any "
                    "more"
                )
            if settings.slot <= entry["slot"]:
                raise BudgetError(
                    f"trustee {self.name}: run {settings.run}: slot {settings.slot}: slot "
                    f"{entry['slot']} was answered, and none is answered twice"
                )
            key = SealingKey(bytes.fromhex(entry["key"]))
            if (self.name, key.public.hex()) not in settings.trustees:
                raise PrivacyError(
                    f"trustee {self.name}: is not among the trustees of the slot, or with "
                    "another key"
                )
            info = settings.info(self.name)
            seeds = [key.open(packet, info) for packet in packets]
            opened = [seed for seed in seeds if seed is not None]
            if len(set(opened)) != len(opened):
                raise PrivacyError("the same seed twice: a pad would count twice")
            if len(opened) != len(seeds):
                places = [i for i, seed in enumerate(seeds) if seed is None]
                return Tally(None, tuple(places))
            is_last = settings.slot == settings.planned_slots
            spent = {**entry, "slot": settings.slot}
            if is_last:
                spent["key"] = ""
            self._folder.write({**content, "runs": {**runs, settings.run: spent}})
        return Tally(self._sum(settings, opened))

    def _sum(self, settings: SlotSettings, seeds: Sequence[bytes]) -> Residues:
        """Return the sum of the seeds' pads less this trustee's noise."""
        total = np.zeros(settings.size, np.uint32)
        for seed in seeds:
            add_pad(total, seed)
        total -= residues(settings.grid.noise(settings.size, self._generator))
        return total


def _require_list(settings: SlotSettings, packets: Sequence[bytes]) -> None:
    """Check the list of packets before any is opened.

    Raises:
        PrivacyError: It is empty, longer than the sum has room for, or has one twice.
    """
    if not 1 <= len(packets) <= settings.num_clients:
        raise PrivacyError(
            f"a sum holds 1 to {settings.num_clients} updates (got {len(packets)})"
        )
    if len(set(packets)) != len(packets):
        raise PrivacyError("the same packet twice: a pad would count twice")


def _without_old_keys(runs: Mapping[str, Any], now: int) -> dict[str, Any]:
    """Return all runs, without the keys that have ended: theft opens nothing of them."""
    return {
        run: entry if entry["expires"] > now else {**entry, "key": ""}
        for run, entry in runs.items()
    }


def load_identity(path: Path) -> Ed25519PrivateKey:
    """Return a trustee's identity key, which `fedllm keys --add-trustee` made.

    Raises:
        ConfigError: It is missing or none, or another user may read or write it.
    """
    require_strict_modes(path)
    try:
        mode = stat.S_IMODE(os.stat(path).st_mode)
        data = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"trustee-key: {path}: {error.strerror}") from None
    if mode & 0o077:
        raise ConfigError(
            f"trustee-key: {path}: others may read it (mode {mode:o}): chmod 600 {path}"
        )
    try:
        key = load_ssh_private_key(data, None)
    except (ValueError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, Ed25519PrivateKey):
        raise ConfigError(
            f"trustee-key: {path}: is no trustee's key: fedllm keys --add-trustee makes one"
        )
    return key
