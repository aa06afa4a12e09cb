"""Runs with a ledger of a name, and what nodes hold of them."""

import json
from pathlib import Path

from fedllm.privacy.chain import Chain
from fedllm.privacy.ledger import Ledger
from fedllm.reporting.dossier_check import NODE_FORMAT
from fedllm.signatures import HEAD_LABEL, public_line, sign
from tests.helpers.sample_runs import write_run


def chain_of(folder: Path) -> Chain:
    return Ledger.load(folder / "privacy.json").chain


def node_file(path: Path, chain: Chain, rounds: int, asked: int, key) -> Path:
    """What a node wrote that was asked for one round more than the end it holds."""
    head = str(chain.head_at(rounds))
    end = {
        "head": head,
        "key": public_line(key.public_key()),
        "signature": sign(HEAD_LABEL, head, key),
        "round": asked,
    }
    path.write_text(json.dumps({"format": NODE_FORMAT, "ends": [end]}))
    return path


def finished(folder: Path, **changes) -> Path:
    """A finished run whose files agree."""
    return write_run(folder, **changes)
