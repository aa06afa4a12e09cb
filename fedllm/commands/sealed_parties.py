"""The nodes of an audit of a sealed run: the clients' and trustees' own code, on real ledgers.

They have what real nodes have, in the home that is set: identity keys, pins, a ledger of each
trustee's slots, one of the clients'. No row is read and no model loaded: what a training would
return is given.
"""

import json
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
)
from flwr.app import Message, RecordDict

from fedllm.atomic_files import write_atomic
from fedllm.auditing.sealed_bench import RUN_ID, Train
from fedllm.client.node_config import parse_node_config
from fedllm.client.run_client import RunClient
from fedllm.client.sealed_roles import trustee_of
from fedllm.client.sealing import say_hello, sealed_reply, tally
from fedllm.client.trustee import Trustee, load_identity
from fedllm.config import RunConfig, fedllm_home
from fedllm.errors import ConfigError
from fedllm.privacy.agreement import Certificate, pin_of
from fedllm.privacy.pads import SealingKey
from fedllm.wire.sealed_messages import HELLO, TALLY


class SealedParties:
    """Nodes 1 to N, of which the first are the trustees of a run config.

    Args:
        config: The run config.
        num_nodes: N.
    """

    def __init__(self, config: RunConfig, num_nodes: int) -> None:
        self._config = config
        self._num_nodes = num_nodes
        self._home = fedllm_home()
        self._pins = ",".join(
            f"{name}:{self._make_identity(name)}" for name in config.trustees
        )

    def answer(
        self, node: int, message: Message, train: Train | None = None
    ) -> RecordDict:
        """Return a node's reply.

        Args:
            node: Its id.
            message: What the server asks.
            train: What stands in the place of its training.

        Raises:
            FedllmError: The node refuses.
        """
        client = self._client(node)
        match message.metadata.message_type:
            case kind if kind == HELLO:
                return say_hello(message, client)
            case kind if kind == TALLY:
                return tally(message, client)
        if train is None:
            raise ConfigError("train: this node has nothing to train on")
        return sealed_reply(message, client, train)

    def trustee(self, name: str) -> Trustee:
        """Return a trustee as it is when its process begins.

        Raises:
            ConfigError: The config names none of that name.
        """
        found = trustee_of(self._client(self._config.trustees.index(name) + 1))
        if found is None:
            raise ConfigError(f"trustee-name: there is no trustee {name!r}")
        return found

    def sealing_key(self, name: str) -> SealingKey:
        """Return the private key that a trustee has of the run now."""
        return SealingKey(bytes.fromhex(self._entry(name)["key"]))

    def signed(self, certificate: Certificate) -> Certificate:
        """Return a certificate with the signature of the trustee that it names."""
        return certificate.signed_by(load_identity(self._key_file(certificate.name)))

    def last_slot(self, name: str) -> int:
        """Return the slot that a trustee has on its disk as answered last."""
        return int(self._entry(name)["slot"])

    def _entry(self, name: str) -> dict[str, Any]:
        path = self._home / "trustees" / name / "ledger.json"
        runs: dict[str, dict[str, Any]]
        runs = json.loads(path.read_text("utf-8"))["content"]["runs"]
        (entry,) = runs.values()
        return entry

    def _make_identity(self, name: str) -> str:
        """Write a trustee's identity key, and return its pin."""
        key = Ed25519PrivateKey.generate()
        text = key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())
        write_atomic(self._key_file(name), text, 0o600)
        return pin_of(key.public_key())

    def _key_file(self, name: str) -> Path:
        return self._home / f"{name}.key"

    def _client(self, node: int) -> RunClient:
        values: dict[str, Any] = {
            "partition-id": node - 1,
            "num-partitions": self._num_nodes,
            "trusted-trustees": self._pins,
        }
        names = self._config.trustees
        if node <= len(names):
            name = names[node - 1]
            values |= {"trustee-name": name}
            values |= {"trustee-key": str(self._key_file(name))}
        return RunClient(self._config, parse_node_config(values), RUN_ID, RUN_ID)
