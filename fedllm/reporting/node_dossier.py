"""A node's own page: what it was asked, what it answered, and what runs promised it.

    FEDLLM_HOME/node/dossier.html   for its owner
    FEDLLM_HOME/node/dossier.json   with the signed ends of runs' ledgers that it holds

It is made at the node, of the node's log and ledger, and sent to nobody. An owner who gives the
JSON away lets others check a run's dossier with it (`fedllm dossier --verify --head`).
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fedllm.atomic_files import write_atomic
from fedllm.errors import NodeError
from fedllm.node.approvals import approvals
from fedllm.node.log import Head, log_path, node_folder, read_lines
from fedllm.node.reviews import reviewers
from fedllm.privacy.wording import plain
from fedllm.reporting.dossier_check import NODE_FORMAT, node_ends
from fedllm.reporting.facts import NOT_KNOWN, Line, Section, fact, section_html
from fedllm.reporting.markup import Html, document, html
from fedllm.signatures import fingerprint, parse_public

_LOG, _LEDGER = "node.log", "ledgers/node"
_LIMITS = (
    "What this node's log and ledger say, and nothing else: made here, of files that never "
    "left this machine. It does not say that anything is lawful; the node's owner decides what "
    "may be shown to whom."
)


def write_node_dossier(budget: Mapping[str, Any]) -> tuple[Path, Path]:
    """Write the page and the JSON of this node.

    Args:
        budget: What client-level runs promised to spend, as `fedllm node budget --json` has
            it; empty if none was charged.

    Returns:
        Paths of the page and of the JSON.

    Raises:
        NodeError: The node has no log, or it was edited, or the files cannot be written.
    """
    entries = list(read_lines(log_path()))
    ends = node_ends(entries)
    sections = node_sections(entries, ends, budget)
    content = {
        "format": NODE_FORMAT,
        "sections": [asdict(section) for section in sections],
        "log": asdict(_head(entries)),
        "ends": ends,
    }
    folder = node_folder()
    paths = folder / "dossier.html", folder / "dossier.json"
    try:
        write_atomic(paths[0], _page(sections).encode(), 0o600)
        text = json.dumps(content, indent=2) + "\n"
        write_atomic(paths[1], text.encode(), 0o600)
    except OSError as error:
        raise NodeError(
            f"{error.filename or folder}: cannot be written: {error.strerror}"
        ) from None
    return paths


def node_sections(
    entries: Sequence[Mapping[str, Any]],
    ends: Sequence[Mapping[str, Any]],
    budget: Mapping[str, Any],
) -> list[Section]:
    """Return the sections of a node's page.

    Args:
        entries: The log's lines, in order.
        ends: The signed ends among them, by `node_ends`.
        budget: As `write_node_dossier`.
    """
    runs: dict[Any, list[Mapping[str, Any]]] = {}
    for entry in entries:
        runs.setdefault(entry.get("run_id"), []).append(entry)
    return [
        _log(entries),
        *(_run(run_id, lines) for run_id, lines in runs.items() if run_id is not None),
        _spent(budget),
        _ends(ends),
        _owner(),
        _unknown(),
    ]


def _head(entries: Sequence[Mapping[str, Any]]) -> Head:
    if not entries:
        return Head(0, "")
    return Head(entries[-1]["number"], entries[-1]["hash"])


def _log(entries: Sequence[Mapping[str, Any]]) -> Section:
    head = _head(entries)
    span = None
    if entries:
        span = f"{entries[0].get('time')} to {entries[-1].get('time')}"
    return Section(
        "The log",
        [
            fact("Lines, each with the hash of the one before", head.number, _LOG),
            fact("From, to (this machine's clock)", span, f"{_LOG}: time"),
            fact("Hash of the last line", head.hash, f"{_LOG}: hash"),
        ],
        "That lines at its end are missing shows only by a head that was noted elsewhere "
        "(fedllm node log --check --head).",
    )


def _run(run_id: Any, entries: Sequence[Mapping[str, Any]]) -> Section:
    """Return what one run asked and got."""
    asked = [entry for entry in entries if entry.get("event") == "asked"]
    answered = [entry for entry in entries if entry.get("event") == "answered"]
    kinds = Counter(str(entry.get("message_type")) for entry in asked)
    codes = Counter(str(entry["code"]) for entry in answered if entry.get("code"))
    refused = sum(1 for entry in asked if entry.get("refused"))
    rounds = sorted({e["round"] for e in asked if type(e.get("round")) is int})
    sent = sum(int(entry.get("num_bytes") or 0) for entry in answered)
    return Section(
        f"Run {run_id}",
        [
            fact("Server", _each(asked, "superlink"), f"{_LOG}: superlink"),
            fact("App, SHA-256", _each(asked, "app"), f"{_LOG}: app"),
            fact("Settings, SHA-256", _each(asked, "config"), f"{_LOG}: config"),
            fact("Messages", _counted(kinds), f"{_LOG}: message_type"),
            fact("Rounds asked for", ", ".join(map(str, rounds)), f"{_LOG}: round"),
            fact("Refused by this node", refused, f"{_LOG}: refused"),
            fact("Answers", len(answered), f"{_LOG}: event"),
            fact(
                "Answers without an update", _counted(codes) or "none", f"{_LOG}: code"
            ),
            fact("Bytes of arrays that left", f"{sent:,}", f"{_LOG}: num_bytes"),
        ],
    )


def _each(entries: Sequence[Mapping[str, Any]], name: str) -> str:
    return ", ".join(dict.fromkeys(str(e[name]) for e in entries if e.get(name)))


def _counted(counts: Counter[str]) -> str:
    return ", ".join(f"{name} x{number}" for name, number in sorted(counts.items()))


def _spent(budget: Mapping[str, Any]) -> Section:
    """Return what client-level runs have promised this node to spend."""
    limits = budget.get("limits") or {}
    delta = limits.get("delta")
    lifetime = budget.get("epsilon_of_lifetime")
    most = limits.get("max_epsilon")
    lines = [
        fact(
            "Largest epsilon that its owner allows",
            most if most is not None or not limits else "no limit",
            f"{_LEDGER}: limits.max_epsilon",
        ),
        fact("Delta of all runs together", delta, f"{_LEDGER}: limits.delta"),
        fact(
            "Epsilon of all client-level runs together, as they promised",
            None if lifetime is None else plain(lifetime),
            f"{_LEDGER}: epsilon of the lifetime",
        ),
    ]
    lines += [
        fact(
            f"Epsilon of run {run['run_id']}",
            plain(run["epsilon"]),
            f"{_LEDGER}: runs.{run['run']}",
        )
        for run in budget.get("runs") or []
    ]
    return Section(
        "What client-level runs promised",
        lines,
        "The node counts what a run promises. It cannot see whether the server adds the noise.",
    )


def _ends(ends: Sequence[Mapping[str, Any]]) -> Section:
    lines = []
    for end in ends:
        key = parse_public(str(end.get("key")))
        name = "no Ed25519 key" if key is None else fingerprint(key)
        lines.append(
            fact(
                str(end["head"]),
                f"signed by {name}; asked for round {end.get('round')}",
                f"{_LOG}: ledger-head",
            )
        )
    return Section(
        "Ends of runs' ledgers, as their servers signed them",
        lines or [Line("None", NOT_KNOWN)],
        "Run, rounds and hash. fedllm dossier --verify --head compares a run's dossier with "
        "them.",
    )


def _owner() -> Section:
    """Return what the owner allowed, at present."""
    lines = [
        fact(
            f"Approval {approval.request.digest[:16]}",
            f"{approval.rounds} rounds, used {max(approval.used.values(), default=0)}, "
            + (
                f"signed by {approval.reviewer}"
                if approval.signature
                else "the owner's"
            ),
            f"approvals/{approval.request.digest}.json",
        )
        for approval in approvals()
    ]
    lines += [
        fact(f"Trusted reviewer {name}", fingerprint(key), f"reviewers/{name}.pub")
        for name, key in reviewers().items()
    ]
    return Section(
        "What the owner allows now", lines or [fact("Approvals", "none", "approvals/")]
    )


def _unknown() -> Section:
    names = (
        "How many rows were trained on (the client's own log has it: logs/)",
        "Whose data the rows are, and under which legal basis",
        "What the server did with the updates",
    )
    return Section("What this page cannot say", [Line(n, NOT_KNOWN) for n in names])


def _page(sections: Sequence[Section]) -> Html:
    header = html(
        '<header><p class="eyebrow"><span>fedllm node</span><span class="state">dossier'
        "</span></p><h1>What this node did</h1><p>{}</p></header>",
        _LIMITS,
    )
    body = [header, *(section_html(section) for section in sections)]
    return document("node dossier", body)
