"""The results of a comparison: compare.json, compare.md, compare.svg and compare.html."""

import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fedllm.atomic_files import write_atomic
from fedllm.reporting.markup import Html, document, html, join, table
from fedllm.reporting.plots import SERIES, inline, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_TITLE = "Does federation help?"

BUDGET = """\
What is equal: base model, adapter and its first values, data, seeds, rounds, the
client's and the server's learning rates, and the rows that choose (validation) and score
(test, once). A client alone makes the steps that it makes in the federation, on its own
rows. The centralised arm makes, in each round, as many steps of the same batch size as
all asked clients together. The federation without DP weighs clients by examples and
clips nothing; with DP they weigh the same. Settings are not tuned for each arm."""

_COLUMNS = (
    "test_loss",
    "perplexity",
    "accuracy",
    "best_round",
    "seconds",
    "megabytes",
    "epsilon",
)
_T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""Student's t at 97.5 % for 1 to 9 degrees of freedom."""


def summarise(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return arm -> column -> {mean, half_width_95, seeds}.

    The clients trained alone become three arms: for each seed the mean over clients, and the
    clients with the lowest and the highest test loss.
    """
    seeds: dict[int, dict[str, Mapping[str, Any]]] = {}
    for row in rows:
        seeds.setdefault(row["seed"], {})[row["arm"]] = row
    arms: dict[str, list[Mapping[str, Any]]] = {}
    for by_arm in seeds.values():
        alone = [row for arm, row in by_arm.items() if arm.startswith("alone-")]
        for arm, row in by_arm.items():
            if not arm.startswith("alone-"):
                arms.setdefault(arm, []).append(row)
        if alone:
            ordered = sorted(alone, key=lambda row: float(row["test_loss"]))
            mean = {name: _mean([row[name] for row in alone]) for name in _COLUMNS}
            arms.setdefault("alone, mean", []).append(mean)
            arms.setdefault("alone, best", []).append(ordered[0])
            arms.setdefault("alone, worst", []).append(ordered[-1])
    return {
        arm: {name: _interval([row[name] for row in arm_rows]) for name in _COLUMNS}
        for arm, arm_rows in arms.items()
    }


def write_comparison(
    out: Path, setting: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]
) -> str:
    """Write the four files and return the table."""
    summary = summarise(rows)
    head, cells = _cells(summary)
    lines = [head, ["---"] * len(head), *cells]
    text = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    content = {"setting": setting, "equal": BUDGET, "summary": summary, "rows": rows}
    write_atomic(out / "compare.json", (json.dumps(content, indent=2) + "\n").encode())
    counted: dict[int, int] = {}
    for row in rows:
        alone = str(row["arm"]).startswith("alone-")
        counted[row["seed"]] = counted.get(row["seed"], 0) + alone
    clients = ", ".join(f"seed {s}: {n}" for s, n in sorted(counted.items()))
    means = (
        "Mean over seeds, with the 95 % interval of Student's t from two seeds on. "
        f"Clients trained alone so far: {clients} of {setting['num_clients']}."
    )
    whole = f"# {_TITLE}\n\n{text}\n{means}\n\n{BUDGET}\n"
    write_atomic(out / "compare.md", whole.encode())
    _plot(out / "compare.svg", summary)
    sections = [
        html("<header><h1>{}</h1></header>{}", _TITLE, table(head, cells)),
        html("<p>{}</p><p>{}</p>", means, BUDGET),
        html('<div class="plots">{}</div>', join(_figures(summary))),
    ]
    write_atomic(out / "compare.html", document(_TITLE, sections).encode())
    return text


def _cells(
    summary: Mapping[str, Mapping[str, Any]],
) -> tuple[list[str], list[list[str]]]:
    """Return the table's head and its rows."""
    head = ["arm", *(name.replace("_", " ") for name in _COLUMNS)]
    head = [{"best round": "round", "megabytes": "MB"}.get(name, name) for name in head]
    digits = (3, 2, 3, 1, 0, 1, 2)
    return head, [
        [arm, *(_cell(columns[n], d) for n, d in zip(_COLUMNS, digits, strict=True))]
        for arm, columns in summary.items()
    ]


def _cell(value: Mapping[str, Any] | None, places: int) -> str:
    if value is None:
        return ""
    text = f"{value['mean']:.{places}f}"
    if value["half_width_95"] is not None:
        text += f" ± {value['half_width_95']:.{places}f}"
    return text


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def _interval(values: Sequence[float | None]) -> dict[str, Any] | None:
    """Return the mean and half of the interval's width; None if no value is known."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    half = None
    if len(known) > 1:
        t = _T95[len(known) - 2] if len(known) - 2 < len(_T95) else 1.96
        half = t * float(np.std(known, ddof=1)) / math.sqrt(len(known))
    return {"mean": float(np.mean(known)), "half_width_95": half, "seeds": len(known)}


def _plot(path: Path, summary: Mapping[str, Mapping[str, Any]]) -> None:
    """Draw one panel for each column that has a value."""
    from matplotlib.figure import Figure

    names = _known(summary)
    figure = Figure(figsize=(7, 1.9 * len(names)), layout="constrained")
    panels = np.atleast_1d(figure.subplots(len(names), 1))
    for axes, name in zip(panels, names, strict=True):
        _draw(axes, summary, name, "#0072b2")
    figure.savefig(path, format="svg")


def _figures(summary: Mapping[str, Mapping[str, Any]]) -> list[Html]:
    """Return the same panels for a page, in its colours."""
    import matplotlib
    from matplotlib.figure import Figure

    figures = []
    for name in _known(summary):
        title = name.replace("_", " ").capitalize()
        with matplotlib.rc_context(style(name)):
            figure = Figure(figsize=(3.7, 2.35), layout="constrained")
            _draw(figure.subplots(), summary, name, SERIES[0])
            out = io.StringIO()
            figure.savefig(out, format="svg", transparent=True)
        values = [f"{arm} {_cell(row[name], 3)}" for arm, row in summary.items()]
        svg = inline(out.getvalue(), name, title, ", ".join(values))
        figures.append(html("<figure><h3>{}</h3>{}</figure>", title, svg))
    return figures


def _known(summary: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return the columns that have a value."""
    return [n for n in _COLUMNS if any(row[n] for row in summary.values())]


def _draw(
    axes: "Axes", summary: Mapping[str, Mapping[str, Any]], name: str, colour: str
) -> None:
    """Draw a column: the mean and interval of each arm that has a value."""
    shown = [(arm, row[name]) for arm, row in summary.items() if row[name]]
    arms = [arm for arm, _ in shown]
    means = [value["mean"] for _, value in shown]
    errors = [value["half_width_95"] or 0.0 for _, value in shown]
    axes.errorbar(means, arms, xerr=errors, fmt="o", color=colour, capsize=3)
    axes.set_xlabel(name.replace("_", " "))
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.3)
