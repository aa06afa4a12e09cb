"""The page of a run: report.html, self-contained."""

from typing import Any

from fedllm.config import RunConfig, flat
from fedllm.privacy.wording import plain
from fedllm.reporting import privacy_section
from fedllm.reporting.markup import document, escape, table
from fedllm.reporting.plots import plots
from fedllm.reporting.sentences import caution, kind_and_rank, verdict
from fedllm.runs.record import RunRecord

SECRET = "not shown, because cohorts are secret"
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
    """Return the page, which needs no network, script or other file."""
    reload = ""
    if run.state == "running":
        reload = f'<meta http-equiv="refresh" content="{_RELOAD_SECONDS}">\n'
    sections = [
        _header(run),
        privacy_section.privacy(run),
        _result(run),
        _plots(run),
        _rounds(run),
        _answers(run),
        privacy_section.audit(run),
        privacy_section.not_covered(run),
        _settings(run),
    ]
    title = f"{run.settings.get('model.name', 'a run')}: run report"
    return document(title, sections, reload)


def _header(run: RunRecord) -> str:
    """Return the head: what is trained, on how many clients, and how far it is."""
    settings, size = run.settings, run.config.get("num_clients")
    state = {
        "running": "running; this page reloads itself",
        "finished": "finished",
        "failed": "failed",
        "interrupted": "interrupted",
    }[run.state]
    parts = [
        f'<p class="eyebrow"><span>fedllm run {escape(run.folder.name)}</span>'
        f'<span class="state">{state}</span></p>',
        f"<h1>{escape(settings.get('model.name', 'A run'))}</h1>",
    ]
    if size is not None:
        value = run.config.get("num_trainable", 0)
        parts.append(
            f"<p>An adapter ({escape(kind_and_rank(settings))}, {value:,} trained values) "
            f"trained on <strong>{size} clients</strong> in {run.rounds_done} of "
            f"{run.rounds_planned} rounds; data: {escape(settings.get('data.name'))}.</p>"
        )
    if run.reason:
        parts.append(f'<p class="alert">{escape(run.reason)}</p>')
    return f"<header>{''.join(parts)}</header>"


def _result(run: RunRecord) -> str:
    """Return the results in numbers."""
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
    sentence = "" if result is None else f"<p>{escape(verdict(result))}</p>"
    return f'<h2>Results</h2>{sentence}<dl class="tiles">{body}</dl>{_probe(run)}'


def _tile(value: str) -> str:
    return f"<small>{value}</small>" if value == SECRET else escape(value)


def _probe(run: RunRecord) -> str:
    """Return what noise alone did to the loss."""
    probe = run.privacy.get("noise_probe")
    if not probe:
        return ""
    return (
        f'<p class="soft">The noise of all rounds alone, without any client, moves the '
        f"validation loss from {probe['before']:.3f} to {probe['noise_alone']:.3f}.</p>"
    )


def _plots(run: RunRecord) -> str:
    """Return the plots of all known values, and the reason why others are missing."""
    if not run.rounds:
        return ""
    figures = [
        f"<figure><h3>{p.title}</h3>{p.svg}<figcaption>{escape(p.summary)}</figcaption>"
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
    """Return the answers of both models to the same questions."""
    if not run.answers or not run.answers["answers"]:
        return ""
    parts = []
    for answer in run.answers["answers"]:
        parts.append(
            f'<div class="answer"><h3>{escape(answer["question"])}</h3><dl>'
            f"<dt>base</dt><dd>{escape(answer['base'])}</dd>"
            f'<div class="tuned"><dt>tuned, round {run.answers["server_round"]}</dt>'
            f"<dd>{escape(answer['tuned'])}</dd></div>"
            f"<dt>what the data says</dt><dd>{escape(answer['reference'])}</dd></dl></div>"
        )
    return (
        "<h2>The same questions to both models</h2>"
        f"<p><strong>{escape(caution(run.settings))}</strong> The questions are rows declared public; "
        f"answers end after {run.answers['max_new_tokens']} tokens.</p>{''.join(parts)}"
    )


def _rounds(run: RunRecord) -> str:
    """Return the table of rounds without its empty columns."""
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
    """Return one value of a round as text."""
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
    """Return one value of a round; seconds are summed if all are known."""
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
    """Return a sum over all rounds; None if a part of it is not known."""
    values = [_value(line, key) for line in run.rounds for key in keys]
    known = [value for value in values if value is not None]
    return sum(known) if known and len(known) == len(values) else None


def _settings(run: RunRecord) -> str:
    """Return the configuration, changed settings first, and the versions."""
    folder = f'<p class="soft">Run folder: <code>{escape(run.folder)}</code></p>'
    settings, defaults = run.settings, flat(RunConfig())
    if not settings:
        return folder
    changed = [[k, str(v)] for k, v in settings.items() if defaults.get(k) != v]
    every = [[k, str(v)] for k, v in settings.items()]
    versions = [[k, str(v)] for k, v in run.config.get("versions", {}).items()]
    changes = (
        table(["Changed from its default", "Value"], changed, "words")
        if changed
        else "<p>Every setting has its default.</p>"
    )
    return (
        f"<h2>Configuration</h2>{changes}"
        f"<details><summary>All settings</summary>{table(['Key', 'Value'], every, 'words')}"
        "</details><details><summary>Versions</summary>"
        f"{table(['Package', 'Version'], versions, 'words')}</details>{folder}"
    )
