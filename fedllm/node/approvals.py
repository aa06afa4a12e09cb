"""Runs that a node's owner has approved, by their app and all of their settings.

    FEDLLM_HOME/node/requests/DIGEST.json    what was asked and not approved
    FEDLLM_HOME/node/approvals/DIGEST.json   what is approved, and how often it was used

The digest is a SHA-256 over the app's and every setting, so changing one value is another
request. A use is counted on disk before the client begins: a crash costs a use and never
grants one.

Under `each` an approval ends after its rounds, over all runs with these settings. Under
`same-settings` it holds for any number of such runs, whoever starts them, until it expires:
whatever bounds their sum is the node's budget. Under `all` nothing is asked.
"""

import contextlib
import hashlib
import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock

from fedllm.atomic_files import write_atomic
from fedllm.errors import NodeError
from fedllm.node.log import node_folder

Settings = Mapping[str, bool | int | float | str]

ALL = "all"
SAME_SETTINGS = "same-settings"
EACH = "each"
POLICIES = (ALL, SAME_SETTINGS, EACH)
"""Which runs a node answers, the strictest last."""

_MOST_REQUESTS = 100
_MOST_BYTES = 65_536
_SECONDS_A_DAY = 86_400


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
    """

    request: Request
    rounds: int
    expires: float
    approved: float
    used: Mapping[str, int] = field(default_factory=dict)


def take(request: Request, message_type: str, policy: str = EACH) -> None:
    """Count one message against the owner's approval, on disk, before it is answered.

    Args:
        request: What the message belongs to.
        message_type: Flower's; what follows a dot in it is left out.
        policy: SAME_SETTINGS: the approval's rounds do not end it.

    Raises:
        NodeError: It is not approved, not any more, or not this often; then the request
            waits for the owner (`fedllm node list`).
    """
    kind = message_type.partition(".")[0]
    with _locked() as folder:
        path = folder / "approvals" / f"{request.digest}.json"
        if not path.exists():
            _remember(folder / "requests", request)
            raise NodeError(
                f"run {request.digest[:16]}: waits for: fedllm node approve "
                f"{request.digest[:16]}"
            )
        approval = _read_approval(path)
        used = approval.used.get(kind, 0)
        if approval.request.digest != request.digest:
            raise NodeError(f"{path}: is not the approval of its name: was it edited?")
        is_used = used >= approval.rounds and policy != SAME_SETTINGS
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
        request = _read_request(_only(folder / "requests", prefix))
        number = rounds or request.settings.get("num-server-rounds")
        if not isinstance(number, int) or number < 1:
            raise NodeError("--rounds: the run does not name its rounds: give a number")
        now = time.time()
        approval = Approval(request, number, now + days * _SECONDS_A_DAY, now)
        _write(folder / "approvals" / f"{request.digest}.json", asdict(approval))
        (folder / "requests" / f"{request.digest}.json").unlink()
    return approval


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
    return [_read_request(path) for path in _oldest_first(node_folder() / "requests")]


def approvals() -> list[Approval]:
    """Return what is approved, the last approved last."""
    paths = (node_folder() / "approvals").glob("*.json")
    return sorted(map(_read_approval, paths), key=lambda approval: approval.approved)


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
    """Yield the node's folder, which no other process changes meanwhile."""
    folder = node_folder()
    with FileLock(folder / "approvals.lock", mode=0o600):
        for name in ("requests", "approvals"):
            (folder / name).mkdir(mode=0o700, exist_ok=True)
        yield folder


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


def _read_request(path: Path) -> Request:
    content = _read(path)
    return Request(content["app"], content["settings"])


def _read_approval(path: Path) -> Approval:
    content = _read(path)
    return Approval(**{**content, "request": Request(**content["request"])})


def _read(path: Path) -> Any:
    """Read one file.

    Raises:
        NodeError: It cannot be read.
    """
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise NodeError(f"{path}: cannot be read: {error}: delete it") from None
