"""Plots of a run as SVG inside a page, in the page's colours."""

import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fedllm.reporting.markup import Html, escape

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from fedllm.runs.record import RunRecord

PHASES = ("train", "aggregate", "evaluate", "save")

# Colours that matplotlib writes and the page's style sheet replaces, so that one drawing
# serves a light and a dark page.
_INK, _FAINT = "#010101", "#020202"
SERIES = ("#030301", "#030302", "#030303", "#030304")
_VARIABLES = {
    _INK: "currentColor",
    _FAINT: "var(--rule)",
    **{colour: f"var(--s{i})" for i, colour in enumerate(SERIES, 1)},
}
_MARKS = "os^D"
_MANY_ROUNDS = 40

_Lines = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Plot:
    """One drawing.

    Attributes:
        name: For ids, unique in a page.
        title: Its title.
        summary: Its values in words, for readers who cannot see it.
        svg: An `svg` element.
    """

    name: str
    title: str
    summary: str
    svg: Html


def plots(run: "RunRecord") -> list[Plot]:
    """Return the plots of a run over its rounds.

    A value that privacy keeps secret is null in metrics.jsonl, and is not drawn.
    """
    known = [_loss(run), _epsilon(run), _traffic(run), _seconds(run), _clients(run)]
    return [plot for plot in known if plot is not None]


def _loss(run: "RunRecord") -> Plot | None:
    names = {
        "validation_loss": "validation",
        "train_loss": "training",
        "client_loss": "clients",
    }
    series = {text: _known(run.rounds, key) for key, text in names.items()}
    series = {text: points for text, points in series.items() if points}
    if not series:
        return None

    def draw(axes: "Axes") -> None:
        for i, (text, points) in enumerate(series.items()):
            _line(axes, points, i, text)
        base = dict(series.get(names["validation_loss"], [])).get(0)
        if base is not None:
            axes.axhline(base, color=_INK, linestyle=":", linewidth=1, label="base")
        is_dpo = run.settings.get("train.objective") == "dpo"
        axes.set_ylabel(f"loss, nats per {'pair' if is_dpo else 'token'}")

    return _plot("loss", "Loss", _ends(series), draw)


def _epsilon(run: "RunRecord") -> Plot | None:
    points = _known(run.rounds, "epsilon")
    if not points:
        return None
    limits = [run.privacy.get(key) or 0.0 for key in ("target_epsilon", "max_epsilon")]
    planned = max(limits)

    def draw(axes: "Axes") -> None:
        _line(axes, points, 0, "spent")
        if planned:
            label = f"limit {planned:g}"
            axes.axhline(planned, color=_INK, linestyle=":", linewidth=1, label=label)
        axes.set_ylim(bottom=0)
        axes.set_ylabel("epsilon")

    summary, ratio = _ends({"epsilon": points}), run.privacy.get("noise_to_signal")
    if ratio is not None:
        summary += f"; R is {ratio:.3g} in every round"
    return _plot("epsilon", "Epsilon spent", summary, draw)


def _traffic(run: "RunRecord") -> Plot | None:
    names = {"megabytes_down": "to clients", "megabytes_up": "from clients"}
    series = {t: _known(run.rounds, key, first=1) for key, t in names.items()}
    if not all(series.values()):
        return None
    return _plot("traffic", "Traffic", _sums(series, "MB"), _bars(series, "MB"))


def _seconds(run: "RunRecord") -> Plot | None:
    lines = [{**(r.get("seconds") or {}), **r} for r in run.rounds]
    series = {phase: _known(lines, phase) for phase in PHASES}
    # If a phase is secret, the other phases say little and might reveal it.
    if not lines or any(len(points) < len(lines) for points in series.values()):
        return None
    draw = _bars(series, "seconds", stacked=True)
    return _plot("seconds", "Seconds by phase", _sums(series, "s"), draw)


def _clients(run: "RunRecord") -> Plot | None:
    names = {
        "clients_asked": "asked",
        "clients_answered": "answered",
        "clients_rejected": "no usable update",
    }
    series = {t: _known(run.rounds, key, first=1) for key, t in names.items()}
    if not all(series.values()):
        return None
    draw = _bars(series, "clients")
    return _plot("clients", "Participation", _sums(series, "in all"), draw)


def _known(lines: _Lines, key: str, first: int = 0) -> list[tuple[int, float]]:
    """Return (round, value) of each known value, from a first round on."""
    return [
        (line["server_round"], line[key])
        for line in lines
        if line["server_round"] >= first and line.get(key) is not None
    ]


def _line(
    axes: "Axes", points: Sequence[tuple[int, float]], index: int, label: str
) -> None:
    x, y = zip(*points, strict=True)
    mark = _MARKS[index] if len(points) <= _MANY_ROUNDS else ""
    colour = SERIES[index]
    axes.plot(x, y, color=colour, marker=mark, markersize=4, linewidth=2, label=label)


def _bars(
    series: Mapping[str, Sequence[tuple[int, float]]], unit: str, stacked: bool = False
) -> Callable[["Axes"], None]:
    """Return the function that draws a group or a stack of bars for each round.

    Bars of many rounds would be stripes, so these are drawn as lines, or as areas for a stack.
    """

    def draw(axes: "Axes") -> None:
        axes.set_ylabel(unit)
        rounds = [r for r, _ in next(iter(series.values()))]
        values = [[value for _, value in points] for points in series.values()]
        if len(rounds) > _MANY_ROUNDS and stacked:
            axes.stackplot(rounds, values, colors=SERIES, labels=series)
        elif len(rounds) > _MANY_ROUNDS:
            for i, (text, points) in enumerate(series.items()):
                _line(axes, points, i, text)
            axes.set_ylim(bottom=0)
        elif stacked:
            floor = [0.0] * len(rounds)
            for i, (text, heights) in enumerate(zip(series, values, strict=True)):
                axes.bar(rounds, heights, 0.7, floor, color=SERIES[i], label=text)
                floor = [f + h for f, h in zip(floor, heights, strict=True)]
        else:
            width = 0.8 / len(series)
            for i, (text, heights) in enumerate(zip(series, values, strict=True)):
                x = [r + (i - (len(series) - 1) / 2) * width for r in rounds]
                axes.bar(x, heights, width, color=SERIES[i], label=text)

    return draw


def style(name: str) -> dict[Any, Any]:
    """Return matplotlib's settings for a drawing that `inline` puts into a page."""
    return {
        "svg.fonttype": "none",
        "svg.hashsalt": name,
        "font.size": 9,
        "axes.edgecolor": _FAINT,
        "axes.labelcolor": _INK,
        "text.color": _INK,
        "xtick.color": _INK,
        "ytick.color": _INK,
        "xtick.labelcolor": _INK,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "legend.frameon": False,
        "axes.formatter.useoffset": False,
    }


def _plot(
    name: str,
    title: str,
    summary: str,
    draw: Callable[["Axes"], None],
) -> Plot:
    """Draw one plot; the same values give the same text."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    with matplotlib.rc_context(style(name)):
        figure = Figure(figsize=(3.7, 2.35), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.subplots()
        axes.grid(axis="y", color=_FAINT, linewidth=0.6)
        axes.set_axisbelow(True)
        axes.tick_params(length=0)
        axes.margins(x=0.03)
        draw(axes)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        whole = axes.get_ylabel() == "clients"
        axes.yaxis.set_major_locator(MaxNLocator(5, integer=whole))
        axes.set_xlabel("round")
        handles, labels = axes.get_legend_handles_labels()
        if len(labels) > 1:
            figure.legend(
                handles,
                labels,
                loc="outside upper left",
                ncols=len(labels),
                fontsize=8,
                handlelength=1.0,
                columnspacing=1.0,
                handletextpad=0.5,
            )
        out = io.StringIO()
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(out, format="svg", metadata=nothing, transparent=True)
    return Plot(name, title, summary, inline(out.getvalue(), name, title, summary))


def inline(svg: str, name: str, title: str, summary: str) -> Html:
    """Return matplotlib's file as an element of a page: no head, no links, ids of its own."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<!--.*?-->", "", svg, flags=re.DOTALL)
    box = re.search(r'viewBox="[^"]*"', svg)
    label = escape(f"{title}: {summary}")
    head = f'<svg role="img" aria-label="{label}" {box.group() if box else ""}>'
    svg = re.sub(r"^<svg[^>]*>", lambda _: head, svg)
    svg = svg.replace("xlink:href", "href")
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', svg)
    svg = re.sub(r'(href="|url\()#', rf"\g<1>#{name}-", svg)
    svg = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", svg)
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, variable)
    # matplotlib escapes the texts that it draws.
    return Html("\n".join(line.strip() for line in svg.splitlines() if line.strip()))


def _ends(series: Mapping[str, Sequence[tuple[int, float]]]) -> str:
    """Return the first and last values of lines in words."""
    return "; ".join(
        f"{name} {points[0][1]:.3g} in round {points[0][0]}, "
        f"{points[-1][1]:.3g} in round {points[-1][0]}"
        for name, points in series.items()
    )


def _sums(series: Mapping[str, Sequence[tuple[int, float]]], unit: str) -> str:
    """Return the sums of bars in words."""
    return "; ".join(
        f"{name} {_plain(sum(value for _, value in points))} {unit}"
        for name, points in series.items()
    )


def _plain(value: float) -> str:
    """Return a number as text without an exponent."""
    return f"{value:.3g}" if value < 1000 else f"{value:,.0f}"
