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
What is equal: base model, adapter and its first values, data, seeds, batch size, and the rows
that score (test, once). A federation makes the rounds of its settings, and public
validation rows choose the round. Every other arm trains as long as pays: Adam from the same first values,
the learning rate falling by half a cosine, several passes over the rows, stopped by a tenth
of them that it does not train on, with the best of several learning rates. `examples` is
how many a client trained on, a row once for each pass, until its best. The federation
without DP weighs clients by examples and clips nothing; with DP they weigh the same."""

_COLUMNS = (
    "test_loss",
    "perplexity",
    "pairs_preferred",
    "pairs_likelier",
    "accuracy",
    "best_round",
    "examples",
    "seconds",
    "megabytes",
    "epsilon",
)
_OF_PAIRS = ("pairs_preferred", "pairs_likelier")
"""Columns of preferences alone: no other table has them."""
_T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""Student's t at 97.5 % for 1 to 9 degrees of freedom."""


def summarise(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return arm -> column -> {mean, half_width_95, seeds}.

    The arms of single clients become three: for each seed the mean over clients, and the
    clients with the lowest and the highest test loss.
    """
    arms: dict[str, list[Mapping[str, Any]]] = {}
    for by_arm in _by_seed(rows).values():
        for arm, row in by_arm.items():
            if _client_of(arm) is None:
                arms.setdefault(arm, []).append(row)
        for group, of_clients in _groups(by_arm).items():
            ordered = sorted(
                of_clients.values(), key=lambda row: float(row["test_loss"])
            )
            mean = {
                name: _mean([row.get(name) for row in ordered]) for name in _COLUMNS
            }
            arms.setdefault(f"{group}, mean", []).append(mean)
            arms.setdefault(f"{group}, best", []).append(ordered[0])
            arms.setdefault(f"{group}, worst", []).append(ordered[-1])
    return {
        arm: {name: _interval([row.get(name) for row in arm_rows]) for name in _COLUMNS}
        for arm, arm_rows in arms.items()
    }


def joining(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return arm -> what a client of it has over the same client alone.

    Returns:
        For each arm of all clients, and each in which clients train on: `better`, of
        `clients` how many end below the same client alone, over all seeds; and `gain`, the
        mean loss alone less the arm's, as `summarise` has columns. Empty if no client was
        trained alone.
    """
    counts: dict[str, list[bool]] = {}
    gains: dict[str, list[float | None]] = {}
    for by_arm in _by_seed(rows).values():
        groups = _groups(by_arm)
        alone = groups.pop("alone", {})
        shared = {
            arm: dict.fromkeys(alone, row)
            for arm, row in by_arm.items()
            if arm in ("federated", "federated-dp")
        }
        for arm, of_clients in {**shared, **groups}.items():
            pairs = [
                float(alone[i]["test_loss"]) - float(row["test_loss"])
                for i, row in of_clients.items()
                if i in alone
            ]
            if pairs:
                counts.setdefault(arm, []).extend(gain > 0 for gain in pairs)
                gains.setdefault(arm, []).append(_mean(pairs))
    return {
        arm: {
            "better": sum(counts[arm]),
            "clients": len(counts[arm]),
            "gain": _interval(gains[arm]),
        }
        for arm in counts
    }


def _by_seed(
    rows: Sequence[Mapping[str, Any]],
) -> dict[int, dict[str, Mapping[str, Any]]]:
    """Return seed -> arm -> row."""
    seeds: dict[int, dict[str, Mapping[str, Any]]] = {}
    for row in rows:
        seeds.setdefault(row["seed"], {})[row["arm"]] = row
    return seeds


def _client_of(arm: str) -> str | None:
    """Return the number at the end of the name of an arm of one client."""
    number = arm.rpartition("-")[2]
    return number if number.isdigit() else None


def _groups(
    by_arm: Mapping[str, Mapping[str, Any]],
) -> dict[str, dict[str, Mapping[str, Any]]]:
    """Return `alone`, `personal-federated`, ... -> client -> row."""
    groups: dict[str, dict[str, Mapping[str, Any]]] = {}
    for arm, row in by_arm.items():
        client = _client_of(arm)
        if client is not None:
            groups.setdefault(arm.removesuffix(f"-{client}"), {})[client] = row
    return groups


def write_comparison(
    out: Path, setting: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]
) -> str:
    """Write the four files and return the table."""
    summary = summarise(rows)
    head, cells = _cells(summary)
    lines = [head, ["---"] * len(head), *cells]
    text = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    gains = joining(rows)
    content = {
        "setting": setting,
        "equal": BUDGET,
        "summary": summary,
        "joining": gains,
        "rows": rows,
    }
    write_atomic(out / "compare.json", (json.dumps(content, indent=2) + "\n").encode())
    clients = ", ".join(
        f"seed {seed}: {len(_groups(by_arm).get('alone', ()))}"
        for seed, by_arm in sorted(_by_seed(rows).items())
    )
    means = (
        "Mean over seeds, with the 95 % interval of Student's t from two seeds on. "
        f"Clients trained alone so far: {clients} of {setting['num_clients']}."
    )
    verdicts = [_verdict(arm, gain) for arm, gain in gains.items()]
    whole = "\n\n".join([f"# {_TITLE}", text.rstrip(), *verdicts, means, BUDGET]) + "\n"
    write_atomic(out / "compare.md", whole.encode())
    _plot(out / "compare.svg", summary)
    sections = [
        html("<header><h1>{}</h1></header>{}", _TITLE, table(head, cells)),
        *(html("<p>{}</p>", line) for line in [*verdicts, means, BUDGET]),
        html('<div class="plots">{}</div>', join(_figures(summary))),
    ]
    write_atomic(out / "compare.html", document(_TITLE, sections).encode())
    return "\n".join([text, *verdicts])


def _verdict(arm: str, joined: Mapping[str, Any]) -> str:
    """Return whether an arm pays for a client, in one sentence."""
    better, clients = joined["better"], joined["clients"]
    return (
        f"{arm}: {better} of {clients} clients end better off than alone; test loss lower "
        f"than alone by {_cell(joined['gain'], 3)} in the mean over clients."
    )


def _cells(
    summary: Mapping[str, Mapping[str, Any]],
) -> tuple[list[str], list[list[str]]]:
    """Return the table's head and its rows."""
    digits = dict(zip(_COLUMNS, (3, 2, 3, 3, 3, 1, 0, 0, 1, 2), strict=True))
    known = _known(summary)
    names = [name for name in _COLUMNS if name not in _OF_PAIRS or name in known]
    head = ["arm", *(name.replace("_", " ") for name in names)]
    head = [{"best round": "round", "megabytes": "MB"}.get(name, name) for name in head]
    return head, [
        [arm, *(_cell(columns[name], digits[name]) for name in names)]
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
