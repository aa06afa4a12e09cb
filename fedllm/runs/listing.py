"""List the runs of a home folder, with what came of each."""

import contextlib
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedllm.errors import FedllmError
from fedllm.privacy.wording import plain
from fedllm.runs.record import RunRecord, read_run


def run_choices(home: Path) -> list[tuple[str, str]]:
    """Return the runs that have an adapter, newest first: (label, folder name)."""
    runs = home / "runs"
    return [
        (_label(summary), summary["name"])
        for summary in all_runs(runs)
        if adapter_names(runs / summary["name"])
    ]


def _label(summary: Mapping[str, Any]) -> str:
    """Name a run for a person."""
    when = summary["time"] or summary["name"]
    if summary["state"] == "damaged":
        return f"{when}, damaged"
    model = str(summary["model"]).rsplit("/", 1)[-1]
    spent = epsilon_words(summary["unit"], summary["epsilon"])
    return f"{when}, {model}, epsilon {spent}, {summary['state']}"


def adapter_names(folder: Path) -> list[str]:
    """Return a run's adapters: what it ended with, its best, then the latest rounds."""
    found = {path.name for path in folder.glob("peft_*") if path.is_dir()}
    numbers = {name.removeprefix("peft_") for name in found}
    rounds = sorted((int(n) for n in numbers if n.isdecimal()), reverse=True)
    ordered = ["peft_final", "peft_best", *(f"peft_{number}" for number in rounds)]
    return [name for name in ordered if name in found]


def first_choice(folder: Path) -> str | None:
    """Return the adapter that a run recommends, else the first of its list."""
    names = adapter_names(folder)
    with contextlib.suppress(FedllmError):
        result = read_run(folder).result or {}
        recommended = Path(str(result.get("recommended"))).name
        if recommended in names:
            return recommended
    return names[0] if names else None


LATEST = "latest"


def all_runs(runs: Path) -> list[dict[str, Any]]:
    """Return a summary of each run, newest first."""
    folders = [p for p in runs.glob("*") if p.is_dir() and not p.is_symlink()]
    shown = [p for p in folders if not p.name.startswith(".")]
    # A name begins with its time.
    return [run_summary(p) for p in sorted(shown, key=lambda p: p.name, reverse=True)]


def run_summary(folder: Path) -> dict[str, Any]:
    """Return what is said of a run in one line; a damaged one says why it is."""
    summary: dict[str, Any] = {"name": folder.name, "time": _time(folder.name)}
    try:
        return summary | _facts(read_run(folder))
    except FedllmError as error:
        why = str(error)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        why = f"{folder}: is damaged: {type(error).__name__}: {error}"
    return summary | {"state": "damaged", "reason": why}


def _facts(run: RunRecord) -> dict[str, Any]:
    """Return the facts of a run that could be read."""
    before, after = _losses(run)
    epsilon = run.privacy.get("epsilon")
    return {
        "model": run.settings.get("model.name"),
        "num_clients": run.config.get("num_clients"),
        "rounds_done": run.rounds_done,
        "rounds_planned": run.rounds_planned,
        "loss_before": None if before is None else float(before),
        "loss_after": None if after is None else float(after),
        "unit": run.privacy.get("unit"),
        "epsilon": None if epsilon is None else float(epsilon),
        "state": run.state,
        "reason": run.reason,
    }


def _losses(run: RunRecord) -> tuple[float | None, float | None]:
    """Return test losses, or validation losses while there are no test losses."""
    if run.result is not None and run.result["test_loss_before"] is not None:
        return run.result["test_loss_before"], run.result["test_loss_after"]
    losses = [line["validation_loss"] for line in run.rounds]
    known = [loss for loss in losses if loss is not None]
    return (known[0], known[-1]) if known else (None, None)


def _time(name: str) -> str | None:
    """Return when a run began, from its name: local time."""
    try:
        when = time.strptime(name[:19], "%Y-%m-%d_%H-%M-%S")
    except ValueError:
        return None
    return time.strftime("%Y-%m-%d %H:%M", when)


def epsilon_words(unit: str | None, epsilon: float | None) -> str:
    """Say what was spent; a run without privacy has no epsilon."""
    return "none" if unit == "none" else "-" if unit is None else plain(epsilon)


def find_run(runs: Path, name: str) -> Path:
    """Return the folder of a run: its name, its path, or `latest`.

    Raises:
        FedllmError: There is none.
    """
    for folder in (runs / name, Path(name).expanduser()):
        if folder.is_dir():
            return folder.resolve()
    raise FedllmError(
        f"{name}: there is no such run in {runs}; without a name all are listed"
    )
