"""The end of a run's ledger, signed, for the nodes to keep.

Each message has the end as it is before the message's round. So a node that was asked for round
5 holds the end of round 4, and its own log has that it was asked for round 5.
"""

from pathlib import Path

from fedllm.privacy.chain import Head
from fedllm.signatures import HEAD_LABEL, public_line, server_key, sign
from fedllm.wire.messages import LEDGER_HEAD, LEDGER_KEY, LEDGER_SIGNATURE


class HeadSigner:
    """Signs by the key of the server's home, which is made with the first run.

    Args:
        home: fedllm's folder.

    Raises:
        ConfigError: Others may write the key's place.
        KeyFolderError: It cannot be made or read.
    """

    def __init__(self, home: Path) -> None:
        self._key = server_key(home)

    def entries(self, head: Head | None) -> dict[str, str]:
        """Return what a message's config holds of the ledger's end; nothing if it has none."""
        if head is None:
            return {}
        text = str(head)
        return {
            LEDGER_HEAD: text,
            LEDGER_KEY: public_line(self._key.public_key()),
            LEDGER_SIGNATURE: sign(HEAD_LABEL, text, self._key),
        }
