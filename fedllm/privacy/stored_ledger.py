"""The ledger of a finished run, checked whatever its unit."""

from collections.abc import Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from fedllm.errors import PrivacyError
from fedllm.privacy.chain import Chain, read_chain
from fedllm.privacy.joint_ledger import JointLedger
from fedllm.privacy.ledger import Ledger
from fedllm.privacy.record_claims import RecordClaims, RecordSettings


def check_ledger(path: Path, content: Mapping[str, Any]) -> Chain | None:
    """Check a privacy.json against itself: numbers, rounds and chain.

    Args:
        path: The file, or where the content came from.
        content: Its content.

    Returns:
        Its chain; None if it has none: of a run without privacy, or of an older version.

    Raises:
        PrivacyError: It was edited, or is damaged.
    """
    unit = content.get("unit")
    if unit == "none":
        return None
    if unit == "record" and content.get("noise") != "joint":
        return _checked_claims(path, content)
    kinds: dict[str, type[Ledger | JointLedger]] = {
        "client": Ledger,
        "record": JointLedger,
    }
    ledger_type = kinds.get(str(unit))
    if ledger_type is None:
        raise PrivacyError(f"{path}: the ledger cannot be read: its unit is {unit!r}")
    return ledger_type.of_content(path, content).chain


def _checked_claims(path: Path, content: Mapping[str, Any]) -> Chain | None:
    """Check the claims of a run with record level and the clients' own noise."""
    try:
        values = {
            f.name: content[f.name]
            for f in fields(RecordSettings)
            if f.name in content or f.default is MISSING
        }
        settings = RecordSettings(**values)
        chain = read_chain(str(content.get("run", "")), settings, content)
    except (ValueError, KeyError, TypeError) as error:
        raise PrivacyError(f"{path}: the ledger cannot be read: {error}") from None
    RecordClaims.of_content(path, content, settings)
    return chain
