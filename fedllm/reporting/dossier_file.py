"""A dossier as files: a page, and JSON that the server's key has signed.

    RUN/dossier.html   for people
    RUN/dossier.json   {"format": ..., "key": ..., "signature": ..., "signed": {...}}

What is signed holds every line, the whole ledger, and the SHA-256 of the page and of each file
that a line comes from.
"""

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import (
    Ed25519PrivateKey,
    Ed25519PublicKey,
)

from fedllm.atomic_files import write_atomic
from fedllm.errors import FedllmError, PrivacyError
from fedllm.privacy.stored_ledger import check_ledger
from fedllm.reporting.dossier import dossier_sections
from fedllm.reporting.facts import Section, section_html
from fedllm.reporting.markup import Html, document, html
from fedllm.runs.directory import (
    CONFIG_FILE,
    METRICS_FILE,
    PRIVACY_FILE,
    RESULT_FILE,
)
from fedllm.runs.record import AUDIT_FILE, MEMORISED_FILE, RunRecord, read_run
from fedllm.signatures import DOSSIER_LABEL, fingerprint, public_line, sign

FORMAT = "fedllm dossier 1"
DOSSIER_PAGE, DOSSIER_FILE = "dossier.html", "dossier.json"
_SOURCES = (
    CONFIG_FILE,
    PRIVACY_FILE,
    METRICS_FILE,
    RESULT_FILE,
    AUDIT_FILE,
    MEMORISED_FILE,
)
_LIMITS = (
    "This page states what files of the run say, and in each line which. It does not say that "
    "the model is anonymous, nor that its training or use is lawful: those whose names stand "
    "under each heading decide that. A line that no file supports is 'not known'."
)


def write_dossier(folder: Path, key: Ed25519PrivateKey) -> tuple[Path, Path]:
    """Write the dossier of a finished run into its folder.

    Args:
        folder: The run folder.
        key: The server's.

    Returns:
        Paths of the page and of the JSON.

    Raises:
        FedllmError: The run did not finish, or its folder is damaged or cannot be written.
        PrivacyError: Its ledger was edited.
    """
    run = read_run(folder)
    if run.state != "finished" or run.result is None:
        raise FedllmError(
            f"{folder}: the run is {run.state}, and a dossier is of a finished one: resume "
            "it (resume.from), or name another run (fedllm runs)"
        )
    if not run.privacy:
        raise FedllmError(f"{folder / PRIVACY_FILE}: is missing: no dossier without it")
    check_ledger(folder / PRIVACY_FILE, run.privacy)
    _require_all_rounds(run)
    try:
        sections = dossier_sections(run)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise FedllmError(
            f"{folder}: is damaged: {type(error).__name__}: {error}"
        ) from None
    page = _page(run, sections, key.public_key()).encode()
    signed = {
        "run": run.privacy.get("run") or folder.name,
        "sections": [asdict(section) for section in sections],
        "ledger": run.privacy,
        "files": _hashes(folder),
        "page": hashlib.sha256(page).hexdigest(),
    }
    content = {
        "format": FORMAT,
        "key": public_line(key.public_key()),
        "signature": sign(DOSSIER_LABEL, signed_text(signed), key),
        "signed": signed,
    }
    paths = folder / DOSSIER_PAGE, folder / DOSSIER_FILE
    try:
        write_atomic(paths[0], page)
        write_atomic(paths[1], (json.dumps(content, indent=2) + "\n").encode())
    except OSError as error:
        raise FedllmError(
            f"{error.filename or folder}: cannot be written: {error.strerror}"
        ) from None
    return paths


def _require_all_rounds(run: RunRecord) -> None:
    """Raise if the server noised a round that its ledger lacks.

    Raises:
        PrivacyError: metrics.jsonl has such a round.
    """
    privacy = run.privacy
    if privacy.get("unit") != "client" and privacy.get("noise") != "joint":
        return
    rounds = {line["server_round"] for line in run.rounds} - {0}
    if missing := sorted(rounds - set(privacy["releases"])):
        raise PrivacyError(
            f"{run.folder / PRIVACY_FILE}: the ledger was edited: it lacks round "
            f"{', '.join(map(str, missing))}, which {METRICS_FILE} has"
        )


def signed_text(signed: Any) -> str:
    """Return the one form in which the facts are signed."""
    return json.dumps(signed, sort_keys=True, separators=(",", ":"))


def _hashes(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of each file that lines come from."""
    return {
        name: hashlib.sha256((folder / name).read_bytes()).hexdigest()
        for name in _SOURCES
        if (folder / name).is_file()
    }


def _page(run: RunRecord, sections: list[Section], key: Ed25519PublicKey) -> Html:
    name = run.privacy.get("run") or run.folder.name
    header = html(
        '<header><p class="eyebrow"><span>fedllm run {}</span><span class="state">dossier'
        "</span></p><h1>{}</h1><p>{}</p></header>",
        name,
        run.settings.get("model.name", "A run"),
        _LIMITS,
    )
    end = html(
        "<h2>How to check this page</h2><p>Its hash, every line above and the whole ledger "
        "are signed in <code>{}</code> beside it, by the key <code>{}</code>: ask the "
        "server's operator for that fingerprint by another way. <code>fedllm dossier {} "
        "--verify --head NODE.json</code> compares the ledger with what nodes hold of it "
        "(<code>fedllm node dossier</code>); without them a ledger that was made anew, or "
        "whose end is missing, is not excluded.</p>",
        DOSSIER_FILE,
        fingerprint(key),
        name,
    )
    body = [header, *(section_html(section) for section in sections), end]
    return document(f"{name}: dossier", body)
