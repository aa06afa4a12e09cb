"""A reviewer, and what it signs."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fedllm.deployment.keys import add_reviewer_key
from fedllm.node.approvals import Request, sign_request


def signed(
    folder: Path, asked: Request, reviewer: str = "alice", **edited: Any
) -> Path:
    """Sign a request, make the reviewer's key if need be, and edit the file afterwards."""
    key = folder / "keys" / "reviewers" / reviewer
    if not key.exists():
        add_reviewer_key(folder / "keys", reviewer)
    waits = folder / "request.json"
    waits.write_text(json.dumps(asdict(asked)))
    approval = {**asdict(sign_request(waits, None, 30, key)), **edited}
    path = folder / f"{reviewer}.signed"
    path.write_text(json.dumps(approval))
    return path


def public_key(folder: Path, reviewer: str = "alice") -> Path:
    return folder / "keys" / "reviewers" / f"{reviewer}.pub"
