"""Who a node is in a sealed run: its trustees' pins, and the trustee that it may be itself.

    FEDLLM_HOME/trustees/NAME      a trustee's ledger
    FEDLLM_HOME/ledgers/slots      the slots that this home's clients have answered
    FEDLLM_HOME/simulated/RUN      all of it, and the trustees' keys, in a simulation, until
                                   the run has ended

A real node has pins and key from its owner. A simulation has no owner: its first virtual nodes
are the trustees that the run config names, and their keys lie in a folder of the run. That
is no boundary, since one user's processes see them all.
"""

from collections.abc import Mapping
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
)

from fedllm.atomic_files import write_atomic
from fedllm.client.run_client import RunClient
from fedllm.client.trustee import Trustee, load_identity
from fedllm.config import fedllm_home
from fedllm.privacy.agreement import pin_of
from fedllm.privacy.sealed_folder import simulated_folder
from fedllm.privacy.slot_ledger import SlotLedger
from fedllm.strict_modes import make_strict_folder


def pins_of(client: RunClient) -> Mapping[str, str]:
    """Return the trustees that this node trusts: name -> public identity key.

    Raises:
        ConfigError: A simulated trustee has no key yet.
    """
    if not client.node.is_simulated:
        return dict(client.node.trusted_trustees)
    return {
        name: pin_of(load_identity(_simulated_key(client, name)).public_key())
        for name in client.config.trustees
    }


def trustee_of(client: RunClient) -> Trustee | None:
    """Return the trustee that this node is in the run; None if it is none.

    Raises:
        ConfigError: Its key cannot be used, or another user may write its folder.
        PrivacyError: Its ledger cannot be trusted or written.
    """
    node, names = client.node, client.config.trustees
    if not node.is_simulated:
        if node.trustee_key is None or node.trustee_name not in names:
            return None
        identity = load_identity(Path(node.trustee_key).expanduser().absolute())
        folder = fedllm_home() / "trustees" / node.trustee_name
        return Trustee(node.trustee_name, identity, folder)
    if node.partition_id >= len(names):
        return None
    name = names[node.partition_id]
    folder = _simulated_folder(client) / name
    return Trustee(name, _simulated_identity(client, name), folder)


def client_slots(client: RunClient) -> SlotLedger:
    """Return the slots that clients of this home have answered.

    Raises:
        ConfigError: Another user may write its place.
        PrivacyError: The ledger cannot be trusted or written.
    """
    if client.node.is_simulated:
        return SlotLedger(_simulated_folder(client) / "slots")
    return SlotLedger(fedllm_home() / "ledgers" / "slots")


def _simulated_folder(client: RunClient) -> Path:
    return simulated_folder(fedllm_home(), client.run_id)


def _simulated_key(client: RunClient, name: str) -> Path:
    return _simulated_folder(client) / f"{name}.key"


def _simulated_identity(client: RunClient, name: str) -> Ed25519PrivateKey:
    """Return a simulated trustee's identity key, made when it is asked for first."""
    path = _simulated_key(client, name)
    if not path.exists():
        make_strict_folder(path.parent)
        key = Ed25519PrivateKey.generate()
        text = key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())
        write_atomic(path, text, 0o600)
    return load_identity(path)
