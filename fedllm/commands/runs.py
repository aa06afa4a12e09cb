"""List the runs of this machine, or show one.

fedllm runs
fedllm runs latest
fedllm runs 2026-11-23_05-39-35_12018571944861707352 --json
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from fedllm.commands.options import add_json, main_of, new_parser, write_json
from fedllm.config import fedllm_home
from fedllm.errors import FedllmError
from fedllm.foreign_text import printable
from fedllm.privacy.wording import plain
from fedllm.reporting.report import write_report
from fedllm.runs.listing import LATEST, all_runs, epsilon_words, find_run, summarise_run
from fedllm.runs.record import RunRecord, read_run


def run(args: argparse.Namespace) -> int:
    """Print the list of runs, or the one that is named."""
    runs = fedllm_home() / "runs"
    content: object
    if args.name is None:
        content = summaries = all_runs(runs)
        lines = _list_lines(runs, summaries)
    else:
        content, lines = _one(find_run(runs, args.name))
    if args.json:
        write_json(content)
    else:
        # A run folder may come from elsewhere: its name and all that its files say.
        shown = (printable(line, limit=None) for line in lines)
        sys.stdout.write("".join(f"{line}\n" for line in shown))
    return 0


def _list_lines(runs: Path, summaries: list[dict[str, Any]]) -> list[str]:
    """Return the list as a person reads it."""
    if not summaries:
        return [f"no runs in {runs} (FEDLLM_HOME names another folder)"]
    head = ("time", "model", "rounds", "loss", "epsilon", "state", "name")
    rows = [head, *(_row(summary) for summary in summaries)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(head) - 1)]
    return [
        "  ".join([*(c.ljust(w) for c, w in zip(row, widths, strict=False)), row[-1]])
        for row in rows
    ]


def _row(summary: dict[str, Any]) -> tuple[str, ...]:
    """Return one line of the list."""
    when, state = summary["time"] or "-", summary["state"]
    if state == "damaged":
        return (when, "-", "-", "-", "-", state, summary["name"])
    before, after = summary["loss_before"], summary["loss_after"]
    planned = summary["rounds_planned"]
    return (
        when,
        str(summary["model"] or "-")[-32:],
        f"{summary['rounds_done']}/{'?' if planned is None else planned}",
        "-" if before is None else f"{before:.3f} -> {after:.3f}",
        epsilon_words(summary["unit"], summary["epsilon"]),
        state,
        summary["name"],
    )


def _one(folder: Path) -> tuple[dict[str, Any], list[str]]:
    """Return a run as JSON content and as lines for a person.

    Raises:
        FedllmError: The run is damaged.
    """
    summary = summarise_run(folder)
    if summary["state"] == "damaged":
        raise FedllmError(summary["reason"])
    record = read_run(folder)
    if summary["state"] == "finished" and not (folder / "report.html").exists():
        # The run was killed between its result and its page.
        write_report(folder)
    content = summary | {
        "folder": str(folder),
        "statement": record.privacy.get("statement"),
        "recommended": None if record.result is None else record.result["recommended"],
        "rounds": record.rounds,
    }
    adapters = sorted(p.name for p in folder.glob("peft_*") if p.is_dir())
    lines = [
        f"{summary['name']}: {summary['state']}"
        + (f": {summary['reason']}" if summary["reason"] else ""),
        f"model: {summary['model']}, {summary['num_clients']} clients",
        f"folder: {folder}",
        f"page: {folder / 'report.html'}",
        f"adapters: {', '.join(adapters) or 'none'}",
    ]
    if content["recommended"]:
        lines.append(f"recommended: {content['recommended']}")
    if content["statement"]:
        lines.append(f"privacy: {content['statement']}")
    return content, lines + _round_lines(record)


def _round_lines(record: RunRecord) -> list[str]:
    """Return the table of rounds, a line each."""
    lines = []
    for line in record.rounds:
        loss, answered = line["validation_loss"], line["clients_answered"]
        cells = [f"round {line['server_round']:>4}"]
        if loss is not None:
            cells.append(f"validation loss {loss:.3f}")
        if line["train_loss"] is not None:
            cells.append(f"train loss {line['train_loss']:.3f}")
        if line["epsilon"] is not None:
            cells.append(f"epsilon {plain(line['epsilon'])}")
        if answered is not None and line["server_round"]:
            cells.append(f"{answered} of {line['clients_asked']} clients answered")
        lines.append("  ".join(cells))
    if record.secret_cohorts and record.rounds:
        lines.append("who or how many took part is not shown, since cohorts are secret")
    return lines


def parser() -> argparse.ArgumentParser:
    """Return the command's parser."""
    parser = new_parser("runs", __doc__)
    parser.add_argument("name", nargs="?", help=f"a run, or `{LATEST}`")
    add_json(parser)
    return parser


main = main_of(parser, run)

if __name__ == "__main__":
    main()
