"""report.html: one page about a run, with all that it needs inside."""

import html
import math
from collections.abc import Sequence
from typing import Any

from fedllm.adapters.kinds import KINDS, kind_of
from fedllm.config import RunConfig, flat
from fedllm.privacy.wording import (
    BANDS,
    BANDS_SOURCE,
    gaussian_guesses_right,
    guesses_right,
    percent,
    plain,
    strength,
)
from fedllm.reporting.plots import plots
from fedllm.reporting.sentences import caution, verdict
from fedllm.reporting.style import STYLE
from fedllm.runs.record import RunRecord

SECRET = "not said, since cohorts are secret"
_RELOAD_SECONDS = 15
_COLUMNS = {
    "server_round": "Round",
    "validation_loss": "Validation loss",
    "train_loss": "Training loss",
    "client_loss": "Clients' held-out loss",
    "client_loss_best": "best client",
    "client_loss_worst": "worst client",
    "epsilon": "Epsilon",
    "noise_to_signal": "R",
    "clients_asked": "Asked",
    "clients_answered": "Answered",
    "clients_rejected": "No usable update",
    "megabytes_down": "MB down",
    "megabytes_up": "MB up",
    "seconds": "Seconds",
}
_SECRET_COLUMNS = {
    "clients_asked",
    "clients_answered",
    "clients_rejected",
    "megabytes_down",
    "megabytes_up",
    "seconds",
}


def page(run: RunRecord) -> str:
    """Return the page; without network, script or file beside it."""
    reload = ""
    if run.state == "running":
        reload = f'<meta http-equiv="refresh" content="{_RELOAD_SECONDS}">\n'
    sections = [
        _header(run),
        _privacy(run),
        _result(run),
        _plots(run),
        _rounds(run),
        _answers(run),
        _audit(run),
        _not_covered(run),
        _settings(run),
    ]
    title = f"{run.settings.get('model.name', 'a run')}: run report"
    return document(title, sections, reload)


def document(title: str, sections: Sequence[str], head: str = "") -> str:
    """Return a page of sections in HTML; empty ones are left out."""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'{head}<link rel="icon" href="data:,">\n<title>{_text(title)}</title>\n'
        f"<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(section for section in sections if section)
        + "\n</main>\n</body>\n</html>\n"
    )


def _header(run: RunRecord) -> str:
    """Say what was trained, on how many clients, and how far it is."""
    settings, size = run.settings, run.config.get("num_clients")
    told = {
        "running": "running; this page reloads itself",
        "finished": "finished",
        "failed": "failed",
        "interrupted": "interrupted",
    }[run.state]
    parts = [
        f'<p class="eyebrow"><span>fedllm run {_text(run.folder.name)}</span>'
        f'<span class="state">{told}</span></p>',
        f"<h1>{_text(settings.get('model.name', 'A run'))}</h1>",
    ]
    if size is not None:
        value = run.config.get("num_trainable", 0)
        parts.append(
            f"<p>An adapter ({_text(kind_and_rank(settings))}, {value:,} trained values) "
            f"trained on <strong>{size} clients</strong> in {run.rounds_done} of "
            f"{run.rounds_planned} rounds; data: {_text(settings.get('data.name'))}.</p>"
        )
    if run.reason:
        parts.append(f'<p class="alert">{_text(run.reason)}</p>')
    return f"<header>{''.join(parts)}</header>"


def kind_and_rank(settings: dict[str, Any]) -> str:
    """Name an adapter: its kind, and the rank of a kind that has one."""
    name = str(settings.get("adapter.kind"))
    if name in KINDS and not kind_of(name).has_rank:
        return name
    return f"{name}, rank {settings.get('adapter.rank')}"


def _privacy(run: RunRecord) -> str:
    """Say the promise large, and what it means."""
    privacy = run.privacy
    if not privacy:
        return ""
    epsilon, unit = privacy.get("epsilon"), privacy.get("unit")
    if unit == "none":
        head = '<p class="epsilon">No privacy</p>'
    else:
        words = strength(None if epsilon is None else float(epsilon))
        if epsilon is None:
            words = "none to speak of"
        so_far = " so far" if run.state == "running" else ""
        head = (
            f'<p class="epsilon">ε&nbsp;=&nbsp;{_text(plain(epsilon))} <small>at '
            f"δ&nbsp;=&nbsp;{privacy['delta']:g}{so_far}: protection is "
            f"<strong>{words}</strong></small></p>{_bands(words)}"
        )
    statement = f'<p class="statement">{_text(privacy["statement"])}</p>'
    return f'<section class="privacy">{head}{statement}{_meaning(privacy)}</section>'


def _bands(current: str) -> str:
    """Show where on the scale an epsilon lies."""
    items, low = [], ""
    for most, word in BANDS:
        here = ' aria-current="true"' if word == current else ""
        reach = f"ε up to {most:g}" if most < float("inf") else f"ε above {low}"
        items.append(f"<li{here}>{word}<br>{reach}</li>")
        low = f"{most:g}"
    source = f'<p class="soft">Words by {_text(BANDS_SOURCE)}.</p>'
    return f'<ol class="bands">{"".join(items)}</ol>{source}'


def _meaning(privacy: dict[str, Any]) -> str:
    """Say what an attacker can reach at most: an adjective alone would flatter."""
    epsilon, delta = privacy.get("epsilon"), privacy.get("delta")
    if privacy.get("unit") == "none" or epsilon is None or delta is None:
        return ""
    unit = "one record of a client" if privacy["unit"] == "record" else "one client"
    replaced = privacy.get("epsilon_replace_one")
    other = " (zero-out), or which of two data sets it held (replace-one)"
    other = other if replaced is not None else ""
    z, releases = privacy.get("noise_multiplier"), privacy.get("num_rounds", 0)
    exact = privacy.get("accountant") == "exact Gaussian" and z
    rows = [[str(privacy["neighbouring_relation"]), epsilon, z]]
    if replaced is not None:
        rows.append(["replace-one", replaced, z / 2 if z else None])
    head = ["Relation", "ε", "Right at most, by ε and δ"]
    body = [
        [name, plain(value), percent(guesses_right(value, delta))]
        + ([percent(gaussian_guesses_right(noise, releases))] if exact else [])
        for name, value, noise in rows
    ]
    if exact:
        head.append("Right at most, by this run's noise")
    return (
        "<h3>What the bound allows</h3><p>Somebody knows everything else about the data, "
        f"and guesses how a fair coin fell: whether {unit} was there or not{other}. Blind "
        "guesses are right in 50 % of cases; no method at all is right more often than "
        "this. (The factor "
        f"e^{_text(plain(epsilon))} is {_factor(epsilon)}.)</p>{table(head, body)}"
        + (
            '<p class="soft">ε and δ bound any mechanism, so they are the weaker limit; '
            "the noise of this run is Gaussian, for which the exact limit is known.</p>"
            if exact
            else ""
        )
    )


def _factor(epsilon: float) -> str:
    """Write e^epsilon, rounded up."""
    if epsilon > 30:
        return "more than a million million"
    factor = math.exp(math.ceil(epsilon * 100 - 1e-9) / 100)
    return f"{math.ceil(factor):,}" if factor >= 100 else f"{factor + 0.005:.2f}"


def _result(run: RunRecord) -> str:
    """Say what came of it, in numbers."""
    tiles: list[tuple[str, str]] = []
    losses = [r.get("validation_loss") for r in run.rounds]
    losses = [loss for loss in losses if loss is not None]
    result = run.result
    if result is not None and result["test_loss_before"] is not None:
        tiles += [
            ("Test loss, base", f"{result['test_loss_before']:.3f}"),
            ("Test loss, recommended", f"{result['test_loss_after']:.3f}"),
        ]
    elif losses:
        tiles += [
            ("Validation loss, base", f"{losses[0]:.3f}"),
            ("Validation loss now", f"{losses[-1]:.3f}"),
        ]
    ratio = run.privacy.get("noise_to_signal")
    if ratio is not None:
        tiles.append(("R, noise to clipping norm, in each round", f"{ratio:.3g}"))
    for name, total, unit in (
        ("Traffic, all rounds", _megabytes(run), "MB"),
        ("Time, all rounds", _total_seconds(run), "s"),
    ):
        if total is not None:
            tiles.append((name, f"{total:,.0f} {unit}"))
        elif run.secret_cohorts:
            tiles.append((name, SECRET))
    body = "".join(f"<div><dt>{k}</dt><dd>{_tile(v)}</dd></div>" for k, v in tiles)
    if not body and result is None:
        return ""
    said = "" if result is None else f"<p>{_text(verdict(result))}</p>"
    return f'<h2>What came of it</h2>{said}<dl class="tiles">{body}</dl>{_probe(run)}'


def _tile(value: str) -> str:
    return f"<small>{value}</small>" if value == SECRET else _text(value)


def _probe(run: RunRecord) -> str:
    """Say what noise alone did."""
    probe = run.privacy.get("noise_probe")
    if not probe:
        return ""
    return (
        f'<p class="soft">The noise of all rounds alone, without any client, moves the '
        f"validation loss from {probe['before']:.3f} to {probe['noise_alone']:.3f}.</p>"
    )


def _plots(run: RunRecord) -> str:
    """Draw what is known, and say of the rest why it is not."""
    if not run.rounds:
        return ""
    figures = [
        f"<figure><h3>{p.title}</h3>{p.svg}<figcaption>{_text(p.summary)}</figcaption>"
        "</figure>"
        for p in plots(run)
    ]
    secret = ""
    if run.secret_cohorts:
        secret = (
            "<p>Participation, rejected updates, traffic and the seconds of training: "
            f"{SECRET}.</p>"
        )
    return f'<h2>Round by round</h2>{secret}<div class="plots">{"".join(figures)}</div>'


def _answers(run: RunRecord) -> str:
    """Let both models speak."""
    if not run.answers or not run.answers["answers"]:
        return ""
    parts = []
    for answer in run.answers["answers"]:
        parts.append(
            f'<div class="answer"><h3>{_text(answer["question"])}</h3><dl>'
            f"<dt>base</dt><dd>{_text(answer['base'])}</dd>"
            f'<div class="tuned"><dt>tuned, round {run.answers["server_round"]}</dt>'
            f"<dd>{_text(answer['tuned'])}</dd></div>"
            f"<dt>what the data says</dt><dd>{_text(answer['reference'])}</dd></dl></div>"
        )
    return (
        "<h2>The same questions to both models</h2>"
        f"<p><strong>{_text(caution(run.settings))}</strong> The questions are rows declared public; "
        f"answers end after {run.answers['max_new_tokens']} tokens.</p>{''.join(parts)}"
    )


def _rounds(run: RunRecord) -> str:
    """Return the table of rounds, less the columns that hold nothing."""
    if not run.rounds:
        return ""
    ratio = run.privacy.get("noise_to_signal")
    lines = [
        {**line, "noise_to_signal": ratio if line["server_round"] else None}
        for line in run.rounds
    ]
    used = [
        k for k in _COLUMNS if any(_value(line, k) is not None for line in lines[1:])
    ]
    if run.secret_cohorts:
        used = [k for k in _COLUMNS if k in used or k in _SECRET_COLUMNS]
    used = used or ["server_round", "validation_loss"]
    rows = [[_cell(run, line, key) for key in used] for line in lines]
    note = ""
    if run.secret_cohorts:
        note = f'<p class="soft">*: {SECRET}.</p>'
    head = [_COLUMNS[key] for key in used]
    return (
        f"<details><summary>All rounds as a table</summary>{table(head, rows)}"
        '<p class="soft">Round 0 is the untuned model; a dash: not measured.</p>'
        f"{note}</details>"
    )


def _cell(run: RunRecord, line: dict[str, Any], key: str) -> str:
    """Write one value of a round."""
    value = _value(line, key)
    if value is None:
        secret = run.secret_cohorts and key in _SECRET_COLUMNS and line["server_round"]
        return "*" if secret else "-"
    if key == "epsilon":
        return plain(value)
    if key.endswith("loss"):
        return f"{value:.3f}"
    if isinstance(value, float) and value < 1000:
        return f"{value:.3g}"
    return f"{value:,.0f}"


def _value(line: dict[str, Any], key: str) -> float | int | None:
    """Return one value of a round; seconds are summed where all are known."""
    value = line.get(key)
    if isinstance(value, dict):
        known = list(value.values())
        return None if None in known else float(sum(known))
    return value


def _megabytes(run: RunRecord) -> float | None:
    return _sum(run, "megabytes_down", "megabytes_up")


def _total_seconds(run: RunRecord) -> float | None:
    return _sum(run, "seconds")


def _sum(run: RunRecord, *keys: str) -> float | None:
    """Return a sum over all rounds, None where a part of it is not known."""
    values = [_value(line, key) for line in run.rounds for key in keys]
    known = [value for value in values if value is not None]
    return sum(known) if known and len(known) == len(values) else None


def _audit(run: RunRecord) -> str:
    """Show what an audit found."""
    audit = run.audit
    if audit is None:
        return ""
    rows = [
        [str(check.get("name")), _passed(check.get("passed")), str(check.get("text"))]
        for check in audit.get("checks") or []
        if isinstance(check, dict)
    ]
    bounds = _bounds(audit.get("rehearsal") or audit)
    return (
        f"<h2>Audit: {_passed(audit.get('passed'))}</h2>"
        + (table(["Epsilon", "", ""], bounds, "words") if bounds else "")
        + f"<p>{_text(audit.get('meaning', ''))}</p>"
        + (
            f"<details><summary>{len(rows)} checks</summary>"
            f"{table(['Check', '', 'Found'], rows, 'words')}</details>"
            if rows
            else ""
        )
    )


def _bounds(found: dict[str, Any]) -> list[list[str]]:
    """Return what is accounted, certified and estimated, where it is there."""
    certified, estimate = found.get("certified"), found.get("estimate")
    rows = []
    if isinstance(found.get("accounted"), int | float):
        rows.append(["accounted", plain(found["accounted"]), "an upper bound"])
    if isinstance(certified, dict):
        rows.append(
            [
                "certified",
                f"{certified['epsilon']:.2f}",
                "a lower bound, 95 % confidence",
            ]
        )
    if isinstance(estimate, dict):
        reach = f"{estimate['low']:.2f} to {estimate['high']:.2f}"
        rows.append(["estimated", f"{estimate['epsilon']:.2f}", reach])
    return rows


def _passed(value: object) -> str:
    return "passed" if value is True else "FAILED"


def _not_covered(run: RunRecord) -> str:
    """List what the statement does not cover."""
    items = "".join(f"<li>{_text(x)}</li>" for x in run.privacy.get("not_covered", []))
    return f"<h2>Not covered by the statement</h2><ul>{items}</ul>" if items else ""


def _settings(run: RunRecord) -> str:
    """Show the configuration, what differs from the defaults first, and versions."""
    where = f'<p class="soft">Run folder: <code>{_text(run.folder)}</code></p>'
    settings, defaults = run.settings, flat(RunConfig())
    if not settings:
        return where
    changed = [[k, str(v)] for k, v in settings.items() if defaults.get(k) != v]
    every = [[k, str(v)] for k, v in settings.items()]
    versions = [[k, str(v)] for k, v in run.config.get("versions", {}).items()]
    said = (
        table(["Changed from its default", "Value"], changed, "words")
        if changed
        else "<p>Every setting has its default.</p>"
    )
    return (
        f"<h2>Configuration</h2>{said}"
        f"<details><summary>All settings</summary>{table(['Key', 'Value'], every, 'words')}"
        "</details><details><summary>Versions</summary>"
        f"{table(['Package', 'Version'], versions, 'words')}</details>{where}"
    )


def table(head: list[str], rows: list[list[str]], kind: str = "") -> str:
    """Return a table that scrolls by itself where it is too wide."""

    def row(cells: list[str], tag: str) -> str:
        inner = "".join(f"<{tag}>{_text(cell)}</{tag}>" for cell in cells)
        return f"<tr>{inner}</tr>"

    body = "".join(row(cells, "td") for cells in rows)
    name = f' class="{kind}"' if kind else ""
    return (
        f'<div class="scroll"><table{name}><thead>{row(head, "th")}</thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _text(value: object) -> str:
    """Escape for HTML."""
    return html.escape(str(value))
