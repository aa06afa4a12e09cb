"""Decide which runs this node answers, and look up what it was asked.

    fedllm node list
    fedllm node approve DIGEST
    fedllm node approve --signature FILE
    fedllm node revoke DIGEST
    fedllm node trust KEY.pub
    fedllm node distrust NAME
    fedllm node sign FILE --key KEY
    fedllm node log --check --head FILE
    fedllm node budget
    fedllm node renew
    fedllm node end RUN
    fedllm node dossier
    fedllm node personal RUN

`list` shows each run that waits, with what differs from the one approved last. Over TLS, or
with `fedllm supernode --approve each`, a run that is not approved gets no update. A reviewer
whose key the owner trusts approves by a signature. `sign` makes it, on the reviewer's own
machine, of a request: a file of the node's folder `requests`.

`budget` shows what client-level runs have promised to spend, in this period and the lifetime.
`renew` begins a new period, and `end` ends a run: what it did not ask for is given back.

`dossier` writes a page of what this node was asked and answered, and JSON with which others
can check a run's dossier (`fedllm dossier --verify --head`). Both stay here until you give them
away.

`personal` trains on from the adapter that a run delivered, on this node's own rows, and keeps
the result here; without RUN the newest run's. No server learns of it.
"""

import argparse
import json
import logging
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fedllm.commands.options import (
    add_home,
    add_json,
    log_to_stderr,
    main_of,
    new_parser,
    positive_int,
    write_json,
)
from fedllm.privacy.wording import rounds_text


def run(args: argparse.Namespace) -> int:
    """Do what the owner asks, and print it."""
    from fedllm.deployment.flower_programs import make_home

    if args.home:
        make_home(args.home)
    said = _WHAT[args.what](args)
    if args.json:
        write_json(_report(args) or {"lines": said})
    else:
        sys.stdout.writelines(f"{line}\n" for line in said)
    return 0


def _report(args: argparse.Namespace) -> dict[str, Any]:
    """Return all that is kept of what a list, log or budget shows; empty for the rest."""
    from fedllm.node.approvals import approvals, pending
    from fedllm.node.log import log_path, read_lines

    if args.what == "list":
        waiting = [{"digest": r.digest, **asdict(r)} for r in pending()]
        return {"pending": waiting, "approved": [asdict(a) for a in approvals()]}
    if args.what == "budget":
        from fedllm.commands.node_budget import budget_report

        return budget_report()
    if args.what == "log" and not args.check:
        return {"lines": list(read_lines(log_path()))}
    return {}


def _list(args: argparse.Namespace) -> list[str]:
    """Return what waits and what is approved."""
    from fedllm.node.approvals import Request, approvals, differences, pending
    from fedllm.node.reviews import reviewers
    from fedllm.signatures import fingerprint

    approved = approvals()
    last = approved[-1].request if approved else Request("", {})
    lines = []
    for request in pending():
        lines.append(f"waits: {request.digest[:16]} app {request.app[:16]}")
        lines += [f"  {line}" for line in differences(request, last)]
    for approval in approved:
        until = time.strftime("%Y-%m-%d", time.gmtime(approval.expires))
        used = max(approval.used.values(), default=0)
        reviewer = approval.reviewer or "nobody who is trusted: it holds no more"
        by = f", signed by {reviewer}" if approval.signature else ""
        lines.append(
            f"approved: {approval.request.digest[:16]} until {until}, "
            f"{used} of {rounds_text(approval.rounds)} used{by}"
        )
    for name, key in reviewers().items():
        lines.append(f"trusted: {name} {fingerprint(key)}")
    return lines or ["nothing waits, nothing is approved"]


def _approve(args: argparse.Namespace) -> list[str]:
    from fedllm.node.approvals import approve, approve_signed

    if args.signature:
        approval = approve_signed(Path(args.signature))
        by = f", signed by {approval.reviewer}"
    else:
        approval, by = approve(args.of, args.rounds, args.days), ""
    return [
        f"approved: {approval.request.digest} for {rounds_text(approval.rounds)}{by}"
    ]


def _revoke(args: argparse.Namespace) -> list[str]:
    from fedllm.node.approvals import revoke

    return [f"revoked: {revoke(args.of)}"]


def _trust(args: argparse.Namespace) -> list[str]:
    from fedllm.node.reviews import reviewers, trust
    from fedllm.signatures import fingerprint

    name = trust(Path(args.of))
    return [f"trusted: {name} {fingerprint(reviewers()[name])}"]


def _distrust(args: argparse.Namespace) -> list[str]:
    from fedllm.node.reviews import distrust

    distrust(args.of)
    return [f"not trusted any more: {args.of}, nor what it has signed"]


def _sign(args: argparse.Namespace) -> list[str]:
    """Write a signed approval beside a request, and return all that it says."""
    from fedllm.errors import NodeError
    from fedllm.node.approvals import Request, differences, sign_request

    if not args.key:
        raise NodeError("--key: needs the file of the reviewer's private key")
    request = Path(args.of)
    approval = sign_request(request, args.rounds, args.days, Path(args.key))
    path = request.with_suffix(".signed")
    try:
        with path.open("x", encoding="utf-8") as file:
            json.dump(asdict(approval), file, indent=2)
    except OSError as error:
        raise NodeError(f"{path}: cannot be written: {error.strerror}") from None
    until = time.strftime("%Y-%m-%d", time.gmtime(approval.expires))
    return [
        f"signed: {path} for {rounds_text(approval.rounds)} until {until}",
        *differences(approval.request, Request("", {})),
    ]


def _log(args: argparse.Namespace) -> list[str]:
    """Return the log's lines, or its end after a check."""
    from fedllm.node.log import check_log, log_path, read_lines

    if not args.check:
        names = ("time", "event", "run_id", "superlink", "code", "refused")
        return [
            " ".join(ascii(entry[name]).strip("'") for name in names if name in entry)
            for entry in read_lines(log_path())
        ]
    noted = args.head
    if noted is not None and Path(noted).is_file():
        noted = Path(noted).read_text("utf-8")
    head = check_log(log_path(), noted)
    remark = "" if noted is not None else " (its end: only a --head can show it)"
    return [f"whole: {head}{remark}"]


def _budget(args: argparse.Namespace) -> list[str]:
    from fedllm.commands.node_budget import budget_lines

    return budget_lines()


def _renew(args: argparse.Namespace) -> list[str]:
    from fedllm.commands.node_budget import renew_lines

    return renew_lines(args.early)


def _end(args: argparse.Namespace) -> list[str]:
    from fedllm.commands.node_budget import end_lines

    return end_lines(args.of)


def _dossier(args: argparse.Namespace) -> list[str]:
    from fedllm.client.node_budget import node_ledger_folder
    from fedllm.commands.node_budget import budget_report
    from fedllm.config import fedllm_home
    from fedllm.reporting.node_dossier import write_node_dossier

    is_charged = node_ledger_folder(fedllm_home()).exists()
    paths = write_node_dossier(budget_report() if is_charged else {})
    return [f"written: {path}" for path in paths]


def _personal(args: argparse.Namespace) -> list[str]:
    """Train the personal adapters of a run, and return what chose among them."""
    from fedllm.client.personal import make_personal, wanted_deliveries
    from fedllm.errors import DataError

    log_to_stderr()
    # A training takes minutes, and its lines show how far it is.
    logging.getLogger("fedllm").setLevel(logging.INFO)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    lines, found = [], wanted_deliveries(args.of)
    for delivery in found:
        try:
            choice = make_personal(delivery)
        except DataError as error:
            if len(found) == 1:
                raise
            # A simulation has many clients here, and some may have few rows.
            lines.append(str(error))
            continue
        client = delivery.node.partition_id
        lines.append(f"run {delivery.run_id}, client {client}: {choice}")
    return [
        *lines,
        "a personal adapter is not private: it stays on this machine. Ask it: "
        "fedllm evaluate --personal --question ...",
    ]


_WHAT = {
    "list": _list,
    "approve": _approve,
    "revoke": _revoke,
    "trust": _trust,
    "distrust": _distrust,
    "sign": _sign,
    "log": _log,
    "budget": _budget,
    "renew": _renew,
    "end": _end,
    "dossier": _dossier,
    "personal": _personal,
}


def parser() -> argparse.ArgumentParser:
    """Return the command's parser."""
    parser = new_parser("node", __doc__)
    parser.add_argument("what", choices=tuple(_WHAT), help="what to do")
    parser.add_argument(
        "of",
        nargs="?",
        default="",
        metavar="OF",
        help="first digits of a run's digest, or the file, name or run that the above names",
    )
    parser.add_argument(
        "--signature", metavar="FILE", help="approve what a trusted reviewer signed"
    )
    parser.add_argument("--key", metavar="FILE", help="a reviewer's private key")
    parser.add_argument(
        "--rounds", type=positive_int, metavar="N", help="default: the run's own number"
    )
    parser.add_argument(
        "--days", type=positive_int, default=30, metavar="N", help="default: 30"
    )
    parser.add_argument("--check", action="store_true", help="check the whole log")
    parser.add_argument(
        "--head", metavar="HEAD", help="an end noted before, or the file that has it"
    )
    parser.add_argument(
        "--early", action="store_true", help="renew before the period's days are over"
    )
    add_json(parser)
    add_home(parser, "the node's log, approvals and budget")
    return parser


main = main_of(parser, run)

if __name__ == "__main__":
    main()
