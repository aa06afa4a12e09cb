"""Check a dossier: signature, page, files, ledger, and what nodes hold of the ledger."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from fedllm.errors import FedllmError, PrivacyError
from fedllm.privacy.chain import Chain, Head
from fedllm.privacy.stored_ledger import check_ledger
from fedllm.reporting.dossier_file import (
    DOSSIER_FILE,
    DOSSIER_PAGE,
    FORMAT,
    signed_text,
)
from fedllm.runs.directory import read_json
from fedllm.signatures import (
    DOSSIER_LABEL,
    HEAD_LABEL,
    fingerprint,
    is_signed,
    parse_public,
)

NODE_FORMAT = "fedllm node dossier 1"


@dataclass(frozen=True)
class Finding:
    """What a check found.

    Attributes:
        passed: Whether it holds; None: it could not be decided.
        text: In a line.
    """

    passed: bool | None
    text: str


def verify_dossier(
    folder: Path, nodes: Sequence[Path], trusted: Ed25519PublicKey | None
) -> Iterator[Finding]:
    """Check the dossier of a run.

    Args:
        folder: Has dossier.json, and whatever else of the run there is.
        nodes: Files that nodes wrote (`fedllm node dossier`).
        trusted: The server's key, from elsewhere; None: it is not known here.

    Raises:
        FedllmError: There is no dossier, or a file cannot be read.
    """
    content = read_json(folder / DOSSIER_FILE)
    signed, line = content.get("signed"), str(content.get("key"))
    key = parse_public(line)
    if content.get("format") != FORMAT or not isinstance(signed, dict) or key is None:
        raise FedllmError(f"{folder / DOSSIER_FILE}: is no dossier of fedllm")
    yield _signature(signed, str(content.get("signature")), key)
    yield _whose(key, trusted)
    yield _same(folder / DOSSIER_PAGE, signed.get("page"), "page")
    files = signed.get("files")
    for name, digest in (files if isinstance(files, dict) else {}).items():
        # A dossier from elsewhere must not make us read files outside this folder.
        yield _same(folder / Path(str(name)).name, digest, "source")
    ledger = signed.get("ledger")
    ledger = ledger if isinstance(ledger, dict) else {}
    chain: Chain | None = None
    try:
        chain = check_ledger(folder / DOSSIER_FILE, ledger)
    except PrivacyError as error:
        yield Finding(False, str(error))
        return
    yield from _chain(chain, ledger)
    if chain is not None:
        yield from _ends(chain, ledger, key, nodes)


def _signature(signed: Any, signature: str, key: Ed25519PublicKey) -> Finding:
    if is_signed(DOSSIER_LABEL, signed_text(signed), signature, key):
        return Finding(True, f"signature: of the key {fingerprint(key)}")
    return Finding(
        False, f"signature: not of the key {fingerprint(key)}: a line was edited"
    )


def _whose(key: Ed25519PublicKey, trusted: Ed25519PublicKey | None) -> Finding:
    if trusted is None:
        return Finding(
            None,
            "key: whose it is, is not known: compare the fingerprint with the server's "
            "operator, or give its file by --key",
        )
    same = fingerprint(key) == fingerprint(trusted)
    text = "the server's" if same else f"is not {fingerprint(trusted)}, the server's"
    return Finding(same, f"key: {text}")


def _same(path: Path, digest: object, what: str) -> Finding:
    """Return whether a file has the hash that was signed."""
    try:
        found = hashlib.sha256(path.read_bytes()).hexdigest()
    except (OSError, ValueError):
        # A name with a null byte is a ValueError.
        return Finding(None, f"{what}: {path.name} is not here, and was not compared")
    if found == digest:
        return Finding(True, f"{what}: {path.name} is as it was signed")
    return Finding(False, f"{what}: {path.name} was changed after it was signed")


def _chain(chain: Chain | None, ledger: Mapping[str, Any]) -> Iterator[Finding]:
    if chain is not None:
        yield Finding(True, f"ledger: a chain of {chain.head.rounds} rounds, whole")
    elif ledger.get("unit") == "none":
        yield Finding(None, "ledger: none, since no noise was added")
    else:
        yield Finding(
            None,
            "ledger: has no chain, as an older version of fedllm wrote it: that a round was "
            "deleted or edited is not excluded",
        )


def _ends(
    chain: Chain,
    ledger: Mapping[str, Any],
    key: Ed25519PublicKey,
    nodes: Sequence[Path],
) -> Iterator[Finding]:
    """Compare the ledger with what each node holds of it."""
    rounds = chain.head.rounds
    reached = 0
    for path in nodes:
        ends = _ends_of(path, chain.head.run)
        if not ends:
            yield Finding(None, f"node {path.name}: has nothing of this run")
        for end in ends:
            finding, known = _end(path, end, chain, ledger, key)
            reached = max(reached, known)
            yield finding
    if reached >= rounds:
        yield Finding(True, f"end: nodes vouch for all {rounds} rounds")
        return
    vouched = f"nodes vouch for {reached} of {rounds} rounds"
    yield Finding(
        None,
        f"end: {vouched if nodes else 'nothing of a node was given (--head)'}: that the "
        "ledger was made anew, or that its end is missing, is not excluded",
    )


def _ends_of(path: Path, run: str) -> list[dict[str, Any]]:
    """Return what a node's file holds of a run's ledger.

    Raises:
        FedllmError: It is no such file.
    """
    content = read_json(path)
    ends = content.get("ends")
    if content.get("format") != NODE_FORMAT or not isinstance(ends, list):
        raise FedllmError(f"{path}: was not written by fedllm node dossier")
    found = []
    for end in ends:
        head = Head.parse(str(end.get("head"))) if isinstance(end, dict) else None
        if head is not None and head.run == run:
            found.append(end)
    return found


def _end(
    path: Path,
    end: Mapping[str, Any],
    chain: Chain,
    ledger: Mapping[str, Any],
    key: Ed25519PublicKey,
) -> tuple[Finding, int]:
    """Return what one end shows, and how many rounds it vouches for."""
    text, where = str(end["head"]), f"node {path.name}"
    head, own = Head.parse(text), parse_public(str(end.get("key")))
    if head is None or own is None or fingerprint(own) != fingerprint(key):
        return Finding(False, f"{where}: its end is signed by another key"), 0
    if not is_signed(HEAD_LABEL, text, str(end.get("signature")), own):
        return Finding(False, f"{where}: its end is not signed as it stands"), 0
    if head.rounds > chain.head.rounds or chain.head_at(head.rounds) != head:
        fault = (
            f"{where}: holds an end of {head.rounds} rounds that this ledger does not have: "
            "a round was edited or taken out, or the ledger was made anew"
        )
        return Finding(False, fault), 0
    asked = end.get("round")
    is_noised = ledger.get("unit") == "client" or ledger.get("noise") == "joint"
    if not is_noised or type(asked) is not int:
        # A round of which no client sent an update is not in a ledger of claims.
        return (
            Finding(True, f"{where}: holds the end of {head.rounds} rounds"),
            head.rounds,
        )
    released = [link["round"] for link in chain.links]
    if asked not in released:
        fault = (
            f"{where}: says that it was asked for round {asked}, which the ledger of a "
            "finished run lacks: its end is missing"
        )
        return Finding(False, fault), 0
    known = f"holds the end of {head.rounds} rounds, and was asked for round {asked}"
    vouched = max(head.rounds, released.index(asked) + 1)
    return Finding(True, f"{where}: {known}"), vouched


def write_text(findings: Sequence[Finding]) -> list[str]:
    """Return the findings as lines."""
    words = {True: "PASS", False: "FAIL", None: "OPEN"}
    return [f"{words[f.passed]}  {f.text}" for f in findings]


def parse_key_file(path: Path) -> Ed25519PublicKey:
    """Read a public key.

    Raises:
        FedllmError: It is none.
    """
    try:
        key = parse_public(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise FedllmError(f"{path}: cannot be read as a public key: {error}") from None
    if key is None:
        raise FedllmError(f"{path}: is no Ed25519 public key: signing/server.pub")
    return key


def node_ends(entries: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the last signed end of each run that a node's log holds.

    Args:
        entries: The log's lines, of which `asked` ones may have an end.
    """
    last: dict[str, dict[str, Any]] = {}
    for entry in entries:
        head = Head.parse(str(entry.get("ledger-head")))
        if entry.get("event") != "asked" or head is None or entry.get("refused"):
            continue
        end = {
            "head": str(head),
            "key": entry.get("ledger-key"),
            "signature": entry.get("ledger-signature"),
            "round": entry.get("round"),
        }
        last[head.run] = end
    return list(last.values())


def as_json(findings: Sequence[Finding]) -> dict[str, Any]:
    """Return the findings for programs."""
    content = [{"passed": f.passed, "text": f.text} for f in findings]
    return {"passed": all(f.passed is not False for f in findings), "checks": content}
