"""The page of a run: report.html, self-contained."""

from typing import Any

from fedllm.config import RunConfig, flat
from fedllm.privacy.wording import plain
from fedllm.reporting import privacy_section
from fedllm.reporting.markup import Html, document, html, join, table
from fedllm.reporting.plots import plots
from fedllm.reporting.sentences import caution, kind_and_rank, verdict
from fedllm.runs.record import RunRecord

SECRET = "not shown, because cohorts are secret"
_RELOAD_SECONDS = 15
_COLUMNS = {
    "server_round": "Round",
    "validation_loss": "Validation loss",
    "pairs_preferred": "Pairs preferred as chosen",
    "pairs_likelier": "Chosen is likelier",
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


def page(run: RunRecord) -> Html:
    """Return the page, which needs no network, script or other file."""
    reload = html("")
    if run.state == "running":
        reload = html('<meta http-equiv="refresh" content="{}">\n', _RELOAD_SECONDS)
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


def _header(run: RunRecord) -> Html:
    """Return the head: what is trained, on how many clients, and how far it is."""
    settings, size = run.settings, run.config.get("num_clients")
    state = {
        "running": "running; this page reloads itself",
        "finished": "finished",
        "failed": "failed",
        "interrupted": "interrupted",
    }[run.state]
    parts = [
        html(
            '<p class="eyebrow"><span>fedllm run {}</span>'
            '<span class="state">{}</span></p>',
            run.folder.name,
            state,
        ),
        html("<h1>{}</h1>", settings.get("model.name", "A run")),
    ]
    if size is not None:
        value = run.config.get("num_trainable", 0)
        parts.append(
            html(
                "<p>An adapter ({}, {} trained values) trained on <strong>{} clients"
                "</strong> in {} of {} rounds; data: {}.</p>",
                kind_and_rank(settings),
                f"{value:,}",
                size,
                run.rounds_done,
                run.rounds_planned,
                settings.get("data.name"),
            )
        )
    if run.reason:
        parts.append(html('<p class="alert">{}</p>', run.reason))
    return html("<header>{}</header>", join(parts))


def _result(run: RunRecord) -> Html:
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
        if result.get("test_pairs_preferred") is not None:
            tiles += [
                (
                    "Test pairs whose chosen answer is likelier, base",
                    f"{result['test_pairs_likelier_before']:.1%}",
                ),
                ("The same, recommended", f"{result['test_pairs_likelier_after']:.1%}"),
                (
                    "Test pairs preferred as chosen",
                    f"{result['test_pairs_preferred']:.1%}",
                ),
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
    body = join(
        html("<div><dt>{}</dt><dd>{}</dd></div>", k, _tile(v)) for k, v in tiles
    )
    if not body and result is None:
        return html("")
    return html(
        '<h2>Results</h2>{}<dl class="tiles">{}</dl>{}',
        "" if result is None else html("<p>{}</p>", verdict(result)),
        body,
        _probe(run),
    )


def _tile(value: str) -> Html:
    return html("<small>{}</small>" if value == SECRET else "{}", value)


def _probe(run: RunRecord) -> Html:
    """Return what noise alone did to the loss."""
    probe = run.privacy.get("noise_probe")
    if not probe:
        return html("")
    return html(
        '<p class="soft">The noise of all rounds alone, without any client, moves the '
        "validation loss from {} to {}.</p>",
        f"{probe['before']:.3f}",
        f"{probe['noise_alone']:.3f}",
    )


def _plots(run: RunRecord) -> Html:
    """Return the plots of all known values, and the reason why others are missing."""
    if not run.rounds:
        return html("")
    figures = [
        html(
            "<figure><h3>{}</h3>{}<figcaption>{}</figcaption></figure>",
            plot.title,
            plot.svg,
            plot.summary,
        )
        for plot in plots(run)
    ]
    secret = html("")
    if run.secret_cohorts:
        secret = html(
            "<p>Participation, rejected updates, traffic and the seconds of training: "
            "{}.</p>",
            SECRET,
        )
    return html(
        '<h2>Round by round</h2>{}<div class="plots">{}</div>', secret, join(figures)
    )


def _answers(run: RunRecord) -> Html:
    """Return the answers of both models to the same questions."""
    if not run.answers or not run.answers["answers"]:
        return html("")
    parts = [
        html(
            '<div class="answer"><h3>{}</h3><dl><dt>base</dt><dd>{}</dd>'
            '<div class="tuned"><dt>tuned, round {}</dt><dd>{}</dd></div>'
            "<dt>what the data says</dt><dd>{}</dd></dl></div>",
            answer["question"],
            answer["base"],
            run.answers["server_round"],
            answer["tuned"],
            answer["reference"],
        )
        for answer in run.answers["answers"]
    ]
    return html(
        "<h2>The same questions to both models</h2><p><strong>{}</strong> The questions "
        "are rows declared public; answers end after {} tokens.</p>{}",
        caution(run.settings),
        run.answers["max_new_tokens"],
        join(parts),
    )


def _rounds(run: RunRecord) -> Html:
    """Return the table of rounds without its empty columns."""
    if not run.rounds:
        return html("")
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
    note = html("")
    if run.secret_cohorts:
        note = html('<p class="soft">*: {}.</p>', SECRET)
    head = [_COLUMNS[key] for key in used]
    return html(
        "<details><summary>All rounds as a table</summary>{}"
        '<p class="soft">Round 0 is the untuned model; a dash: not measured.</p>'
        "{}</details>",
        table(head, rows),
        note,
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


def _settings(run: RunRecord) -> Html:
    """Return the configuration, changed settings first, and the versions."""
    folder = html('<p class="soft">Run folder: <code>{}</code></p>', run.folder)
    settings, defaults = run.settings, flat(RunConfig())
    if not settings:
        return folder
    changed = [[k, str(v)] for k, v in settings.items() if defaults.get(k) != v]
    every = [[k, str(v)] for k, v in settings.items()]
    versions = [[k, str(v)] for k, v in run.config.get("versions", {}).items()]
    changes = (
        table(["Changed from its default", "Value"], changed, "words")
        if changed
        else html("<p>Every setting has its default.</p>")
    )
    return html(
        "<h2>Configuration</h2>{}<details><summary>All settings</summary>{}</details>"
        "<details><summary>Versions</summary>{}</details>{}",
        changes,
        table(["Key", "Value"], every, "words"),
        table(["Package", "Version"], versions, "words"),
        folder,
    )
