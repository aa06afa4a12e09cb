"""Decide which runs this node answers, and look up what it was asked.

    fedllm node list
    fedllm node approve DIGEST
    fedllm node revoke DIGEST
    fedllm node log --check --head FILE

`list` shows each run that waits, with what differs from the one approved last. Over TLS, or
with `fedllm supernode --approve each`, a run that is not approved gets no update.
"""

import argparse
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fedllm.commands.options import (
    add_home,
    add_json,
    new_parser,
    positive_int,
    run_command,
    write_json,
)


def run(args: argparse.Namespace) -> int:
    """Do what the owner asks, and print it."""
    from fedllm.deployment.flower_programs import make_home

    if args.home:
        make_home(args.home)
    lines = {"list": _list, "approve": _approve, "revoke": _revoke, "log": _log}
    said = lines[args.what](args)
    if args.json:
        write_json(_report(args) or {"lines": said})
    else:
        sys.stdout.writelines(f"{line}\n" for line in said)
    return 0


def _report(args: argparse.Namespace) -> dict[str, Any]:
    """Return all that is kept of what a list or a log shows; empty for the rest."""
    from fedllm.node.approvals import approvals, pending
    from fedllm.node.log import log_path, read_lines

    if args.what == "list":
        waiting = [{"digest": r.digest, **asdict(r)} for r in pending()]
        return {"pending": waiting, "approved": [asdict(a) for a in approvals()]}
    if args.what == "log" and not args.check:
        return {"lines": list(read_lines(log_path()))}
    return {}


def _list(args: argparse.Namespace) -> list[str]:
    """Return what waits and what is approved."""
    from fedllm.node.approvals import Request, approvals, differences, pending

    approved = approvals()
    last = approved[-1].request if approved else Request("", {})
    lines = []
    for request in pending():
        lines.append(f"waits: {request.digest[:16]} app {request.app[:16]}")
        lines += [f"  {line}" for line in differences(request, last)]
    for approval in approved:
        until = time.strftime("%Y-%m-%d", time.gmtime(approval.expires))
        used = max(approval.used.values(), default=0)
        lines.append(
            f"approved: {approval.request.digest[:16]} until {until}, "
            f"{used} of {approval.rounds} rounds used"
        )
    return lines or ["nothing waits, nothing is approved"]


def _approve(args: argparse.Namespace) -> list[str]:
    from fedllm.node.approvals import approve

    approval = approve(args.digest, args.rounds, args.days)
    return [f"approved: {approval.request.digest} for {approval.rounds} rounds"]


def _revoke(args: argparse.Namespace) -> list[str]:
    from fedllm.node.approvals import revoke

    return [f"revoked: {revoke(args.digest)}"]


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


def parser() -> argparse.ArgumentParser:
    """Return the command's parser."""
    parser = new_parser("node", __doc__)
    parser.add_argument(
        "what", choices=("list", "approve", "revoke", "log"), help="what to do"
    )
    parser.add_argument("digest", nargs="?", default="", help="of a run: first digits")
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
    add_json(parser)
    add_home(parser, "the node's log and approvals")
    return parser


def main(arguments: list[str] | None = None) -> None:
    """Run the command; an error is one line and exit status 1."""
    run_command(parser(), run, arguments)


if __name__ == "__main__":
    main()
