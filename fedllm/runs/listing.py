"""List the runs of a home folder, with their results."""

import contextlib
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedllm.errors import FedllmError
from fedllm.privacy.wording import plain
from fedllm.runs.record import RunRecord, read_run

LATEST = "latest"
"""Name of the link to the newest run."""


def run_choices(home: Path) -> list[tuple[str, str]]:
    """Return the label and folder name of each run with an adapter, newest first."""
    runs = home / "runs"
    return [
        (_label(summary), summary["name"])
        for summary in all_runs(runs)
        if adapter_names(runs / summary["name"])
    ]


def _label(summary: Mapping[str, Any]) -> str:
    """Return the label of a run for a person."""
    when = summary["time"] or summary["name"]
    if summary["state"] == "damaged":
        return f"{when}, damaged"
    model = str(summary["model"]).rsplit("/", 1)[-1]
    spent = epsilon_words(summary["unit"], summary["epsilon"])
    return f"{when}, {model}, epsilon {spent}, {summary['state']}"


def adapter_names(folder: Path) -> list[str]:
    """Return the names of a run's adapters: final, best, then rounds, latest first."""
    names = {path.name for path in folder.glob("peft_*") if path.is_dir()}
    numbers = {name.removeprefix("peft_") for name in names}
    rounds = sorted((int(n) for n in numbers if n.isdecimal()), reverse=True)
    ordered = ["peft_final", "peft_best", *(f"peft_{number}" for number in rounds)]
    return [name for name in ordered if name in names]


def recommended_adapter(folder: Path) -> str | None:
    """Return the name of the adapter that a run recommends, else its first one."""
    names = adapter_names(folder)
    with contextlib.suppress(FedllmError):
        result = read_run(folder).result or {}
        recommended = Path(str(result.get("recommended"))).name
        if recommended in names:
            return recommended
    return names[0] if names else None


def all_runs(runs: Path) -> list[dict[str, Any]]:
    """Return the summary of each run, newest first."""
    folders = [p for p in runs.glob("*") if p.is_dir() and not p.is_symlink()]
    shown = [p for p in folders if not p.name.startswith(".")]
    # A name begins with its time.
    return [summarise_run(p) for p in sorted(shown, key=lambda p: p.name, reverse=True)]


def summarise_run(folder: Path) -> dict[str, Any]:
    """Return the summary of a run; that of a damaged one has the reason."""
    summary: dict[str, Any] = {"name": folder.name, "time": _time(folder.name)}
    try:
        return summary | _facts(read_run(folder))
    except FedllmError as error:
        reason = str(error)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        reason = f"{folder}: is damaged: {type(error).__name__}: {error}"
    return summary | {"state": "damaged", "reason": reason}


def _facts(run: RunRecord) -> dict[str, Any]:
    """Return the facts of a run that can be read."""
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
    """Return the test losses before and after; validation losses if there are none."""
    if run.result is not None and run.result["test_loss_before"] is not None:
        return run.result["test_loss_before"], run.result["test_loss_after"]
    losses = [line["validation_loss"] for line in run.rounds]
    known = [loss for loss in losses if loss is not None]
    return (known[0], known[-1]) if known else (None, None)


def _time(name: str) -> str | None:
    """Return the local time when a run began, from its name."""
    try:
        when = time.strptime(name[:19], "%Y-%m-%d_%H-%M-%S")
    except ValueError:
        return None
    return time.strftime("%Y-%m-%d %H:%M", when)


def epsilon_words(unit: str | None, epsilon: float | None) -> str:
    """Return the spent epsilon in words; a run without privacy has none."""
    return "none" if unit == "none" else "-" if unit is None else plain(epsilon)


def find_run(runs: Path, name: str) -> Path:
    """Return the folder of a run: its name, its path, or `latest`.

    Raises:
        FedllmError: There is no such run.
    """
    for folder in (runs / name, Path(name).expanduser()):
        if folder.is_dir():
            return folder.resolve()
    raise FedllmError(
        f"{name}: there is no such run in {runs}; without a name all are listed"
    )
