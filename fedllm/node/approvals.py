"""Runs that a node's owner has approved, by their app and all of their settings.

    FEDLLM_HOME/node/requests/DIGEST.json    what was asked and not approved
    FEDLLM_HOME/node/approvals/DIGEST.json   what is approved, and how often it was used

The digest is a SHA-256 over the app's and every setting, so changing one value is another
request. A use is counted on disk before the client begins: a crash costs a use and never
grants one.

Under `each` an approval ends after its rounds, over all runs with these settings. Under
`same-settings` it holds for any number of such runs, whoever starts them, until it expires:
what bounds their sum is the node's budget. Under `all` nothing is asked. What a reviewer
signed (`reviews.py`) is never stretched: its rounds hold under `same-settings` too.
"""

import contextlib
import hashlib
import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from filelock import FileLock
from pydantic import TypeAdapter

from fedllm.atomic_files import write_atomic
from fedllm.errors import NodeError
from fedllm.node.log import node_folder
from fedllm.node.reviews import sign, signer

Settings = Mapping[str, bool | int | float | str]

ALL = "all"
SAME_SETTINGS = "same-settings"
EACH = "each"
POLICIES = (ALL, SAME_SETTINGS, EACH)
"""Which runs a node answers, the strictest last."""

DELIVERY = "query.deliver"
"""Type of the message that brings the released adapter, as `wire.messages` has it too (a
test compares)."""
COUNTED_APART = (DELIVERY, "query.hello", "query.tally")
"""Types that are counted apart: that message, and what `wire.sealed_messages` asks a node before
round 1 and a trustee in each round."""

_MOST_REQUESTS = 100
_MOST_BYTES = 65_536
_SECONDS_A_DAY = 86_400
_Kept = TypeVar("_Kept")


@dataclass(frozen=True)
class Request:
    """An app and the settings of a run, which a server asks this node to run.

    Attributes:
        app: SHA-256 of the app.
        settings: Every setting, flat.
    """

    app: str
    settings: Settings

    @property
    def digest(self) -> str:
        """The SHA-256 of all of it."""
        content = {"app": self.app, "settings": dict(self.settings)}
        text = json.dumps(content, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class Approval:
    """What the owner allows of a request.

    Attributes:
        request: The request.
        rounds: How many messages of each type may be answered.
        expires: Until when, in seconds since 1970.
        approved: When it was approved.
        used: Message type -> messages so far.
        signature: A reviewer's, of all but the last two; empty: the owner's own.
    """

    request: Request
    rounds: int
    expires: int
    approved: float
    used: Mapping[str, int] = field(default_factory=dict)
    signature: str = ""

    @property
    def reviewer(self) -> str | None:
        """The trusted reviewer who signed it; None if none did."""
        return signer(self.request.digest, self.rounds, self.expires, self.signature)


def take(request: Request, message_type: str, policy: str = EACH) -> None:
    """Count one message against the owner's approval, on disk, before it is answered.

    Args:
        request: What the message belongs to.
        message_type: Flower's; what follows a dot in it is left out, but for
            COUNTED_APART.
        policy: SAME_SETTINGS: the approval's rounds do not end it.

    Raises:
        NodeError: It is not approved, not any more, or not this often; then the request
            waits for the owner (`fedllm node list`).
    """
    # An action that any server may make up is no further count. These a run needs besides
    # its announcement, one of them in each round.
    is_apart = message_type in COUNTED_APART
    kind = message_type if is_apart else message_type.partition(".")[0]
    with _locked() as folder:
        path = folder / "approvals" / f"{request.digest}.json"
        if not path.exists():
            _remember(folder / "requests", request)
            raise NodeError(
                f"run {request.digest[:16]}: waits for: fedllm node approve "
                f"{request.digest[:16]}"
            )
        approval = _read(path, Approval)
        used = approval.used.get(kind, 0)
        if approval.request.digest != request.digest:
            raise NodeError(f"{path}: is not the approval of its name: was it edited?")
        if approval.signature and approval.reviewer is None:
            _remember(folder / "requests", request)
            raise NodeError(
                f"run {request.digest[:16]}: no reviewer whom this node trusts has signed "
                f"its approval: fedllm node approve {request.digest[:16]}"
            )
        is_limited = policy != SAME_SETTINGS or approval.signature != ""
        is_used = is_limited and used >= approval.rounds
        if time.time() >= approval.expires or is_used:
            _remember(folder / "requests", request)
            raise NodeError(
                f"run {request.digest[:16]}: its approval has expired, or its "
                f"{approval.rounds} rounds are used: fedllm node approve again"
            )
        counts = {**approval.used, kind: used + 1}
        _write(path, {**asdict(approval), "used": counts})


def approve(prefix: str, rounds: int | None, days: float) -> Approval:
    """Approve a request that waits.

    Args:
        prefix: The first digits of its digest.
        rounds: How many; None: the run's `num-server-rounds`.
        days: After how many days the approval expires.

    Raises:
        NodeError: No request, or more than one, begins so, or its rounds are unknown.
    """
    with _locked() as folder:
        request = _read(_only(folder / "requests", prefix), Request)
        approval = _approval(request, rounds, days)
        _keep(folder, approval)
    return approval


def sign_request(path: Path, rounds: int | None, days: float, key: Path) -> Approval:
    """Sign a request as a reviewer, wherever the reviewer is.

    Args:
        path: The request, a file of a node's folder `requests`.
        rounds: How many; None: the run's `num-server-rounds`.
        days: After how many days the approval expires.
        key: File of the reviewer's private key.

    Raises:
        ConfigError: Others may write the key.
        NodeError: The request or the key cannot be read, or its rounds are unknown.
    """
    approval = _approval(_read(path, Request), rounds, days)
    digest = approval.request.digest
    signature = sign(digest, approval.rounds, approval.expires, key)
    return replace(approval, signature=signature)


def approve_signed(path: Path) -> Approval:
    """Approve what a trusted reviewer has signed, before it is asked for or after.

    What was used of the same request before counts: a signature's rounds are all that it
    allows, however often its file is brought here.

    Raises:
        NodeError: No trusted reviewer has signed it, it has expired, or it cannot be read.
    """
    approval = _read(path, Approval)
    if approval.reviewer is None:
        raise NodeError(
            f"{path}: no reviewer whom this node trusts has signed it as it stands: "
            "fedllm node trust KEY.pub"
        )
    if time.time() >= approval.expires:
        raise NodeError(f"{path}: has expired: ask the reviewer for a new one")
    with _locked() as folder:
        before = folder / "approvals" / f"{approval.request.digest}.json"
        used = _read(before, Approval).used if before.exists() else {}
        approval = replace(approval, approved=time.time(), used=used)
        _keep(folder, approval)
    return approval


def _approval(request: Request, rounds: int | None, days: float) -> Approval:
    """Return an approval that begins now.

    Raises:
        NodeError: Neither the run nor the caller names its rounds.
    """
    number = rounds or request.settings.get("num-server-rounds")
    if type(number) is not int or number < 1:
        raise NodeError("--rounds: the run does not name its rounds: give a number")
    now = time.time()
    return Approval(request, number, int(now + days * _SECONDS_A_DAY), now)


def _keep(folder: Path, approval: Approval) -> None:
    """Write an approval; its request waits no longer."""
    name = f"{approval.request.digest}.json"
    _write(folder / "approvals" / name, asdict(approval))
    (folder / "requests" / name).unlink(missing_ok=True)


def revoke(prefix: str) -> str:
    """Take an approval back, and return its digest.

    Raises:
        NodeError: No approval, or more than one, begins so.
    """
    with _locked() as folder:
        path = _only(folder / "approvals", prefix)
        path.unlink()
    return path.stem


def pending() -> list[Request]:
    """Return the requests that wait, the oldest first."""
    paths = _oldest_first(node_folder() / "requests")
    return [_read(path, Request) for path in paths]


def approvals() -> list[Approval]:
    """Return what is approved, the last approved last."""
    paths = (node_folder() / "approvals").glob("*.json")
    found = [_read(path, Approval) for path in paths]
    return sorted(found, key=lambda approval: approval.approved)


def differences(request: Request, other: Request) -> list[str]:
    """Return what a request has otherwise, a line each.

    What a server sent is shown as JSON in ASCII, so that it cannot steer a terminal.
    """
    lines = [] if request.app == other.app else [f"app: {other.app} -> {request.app}"]
    for key in sorted({*request.settings, *other.settings}):
        was, now = (json.dumps(r.settings.get(key)) for r in (other, request))
        if was != now:
            lines.append(f"{json.dumps(key)[1:-1]}: {was} -> {now}")
    return lines


@contextlib.contextmanager
def _locked() -> Iterator[Path]:
    """Yield the node's folder, which no other process changes meanwhile.

    Raises:
        NodeError: Something in it cannot be written.
    """
    folder = node_folder()
    try:
        with FileLock(folder / "approvals.lock", mode=0o600):
            for name in ("requests", "approvals"):
                (folder / name).mkdir(mode=0o700, exist_ok=True)
            yield folder
    except OSError as error:
        raise NodeError(
            f"{error.filename or folder}: cannot be written: {error.strerror}: nothing is "
            "answered that cannot be counted"
        ) from None


def _remember(folder: Path, request: Request) -> None:
    """Keep a request for the owner: the newest ones, since a server can make any number."""
    if len(json.dumps(asdict(request))) > _MOST_BYTES:
        raise NodeError("the run's settings are too many to be shown to an owner")
    path = folder / f"{request.digest}.json"
    if not path.exists():
        for old in list(_oldest_first(folder))[: -_MOST_REQUESTS + 1]:
            old.unlink()
        _write(path, asdict(request))


def _oldest_first(folder: Path) -> Iterator[Path]:
    yield from sorted(folder.glob("*.json"), key=lambda path: path.stat().st_mtime)


def _only(folder: Path, prefix: str) -> Path:
    """Return the one file whose name begins so."""
    paths = [path for path in folder.glob("*.json") if path.stem.startswith(prefix)]
    if len(paths) != 1 or not prefix:
        raise NodeError(
            f"{prefix!r}: {len(paths)} {folder.name} begin so: fedllm node list"
        )
    return paths[0]


def _write(path: Path, content: Any) -> None:
    write_atomic(path, json.dumps(content).encode(), 0o600)


def _read(path: Path, kind: type[_Kept]) -> _Kept:
    """Read one file.

    Raises:
        NodeError: It cannot be read, or holds something else.
    """
    try:
        with path.open("rb") as file:
            content = file.read(_MOST_BYTES * 2)
        # Strict: a 3 that is text, or a 3.5 that becomes 3, was written by nobody here.
        return TypeAdapter(kind).validate_json(content, strict=True)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise NodeError(
            f"{path}: cannot be read as {kind.__name__}: {reason}"
        ) from None
