"""List the runs of this machine, or show one.

python -m fedllm.commands.runs
python -m fedllm.commands.runs latest
python -m fedllm.commands.runs 2026-11-23_05-39-35_12018571944861707352 --json
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from fedllm.config import fedllm_home
from fedllm.errors import FedllmError
from fedllm.privacy.wording import plain
from fedllm.reporting.report import write_report
from fedllm.runs.listing import LATEST, all_runs, epsilon_words, find_run, run_summary
from fedllm.runs.record import RunRecord, read_run


def main(arguments: list[str] | None = None) -> None:
    """Run the command; an error is one line and exit status 1."""
    args = _parser().parse_args(arguments)
    runs = fedllm_home() / "runs"
    found: object
    try:
        if args.name is None:
            found = listed = all_runs(runs)
            lines = _list_lines(runs, listed)
        else:
            found, lines = _one(find_run(runs, args.name))
    except FedllmError as error:
        sys.exit(f"{type(error).__name__}: {error}")
    if args.json:
        lines = [json.dumps(found, indent=2)]
    sys.stdout.write("\n".join(lines) + "\n")


def _list_lines(runs: Path, found: list[dict[str, Any]]) -> list[str]:
    """Return the list for a person."""
    if not found:
        return [f"no runs in {runs} (FEDLLM_HOME names another folder)"]
    head = ("time", "model", "rounds", "loss", "epsilon", "state", "name")
    rows = [head, *(_row(summary) for summary in found)]
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
    """Return a run, for programs and for a person.

    Raises:
        FedllmError: It is damaged.
    """
    summary = run_summary(folder)
    if summary["state"] == "damaged":
        raise FedllmError(summary["reason"])
    run = read_run(folder)
    if summary["state"] == "finished" and not (folder / "report.html").exists():
        # It was killed between its result and its page.
        write_report(folder)
    found = summary | {
        "folder": str(folder),
        "statement": run.privacy.get("statement"),
        "recommended": None if run.result is None else run.result["recommended"],
        "rounds": run.rounds,
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
    if found["recommended"]:
        lines.append(f"recommended: {found['recommended']}")
    if found["statement"]:
        lines.append(f"privacy: {found['statement']}")
    return found, lines + _round_lines(run)


def _round_lines(run: RunRecord) -> list[str]:
    """Return a table of rounds."""
    lines = []
    for line in run.rounds:
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
    if run.secret_cohorts and run.rounds:
        lines.append("who or how many took part is not said, since cohorts are secret")
    return lines


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", nargs="?", help=f"a run, or `{LATEST}`")
    parser.add_argument("--json", action="store_true", help="one object, for programs")
    return parser


if __name__ == "__main__":
    main()
