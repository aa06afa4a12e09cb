"""The privacy of a run on its page: statement, what it allows, audit, limits."""

import math
from typing import Any

from fedllm.privacy.wording import (
    BANDS,
    BANDS_SOURCE,
    gaussian_guesses_right,
    guesses_right,
    percent,
    plain,
)
from fedllm.reporting.markup import Html, html, join, table
from fedllm.reporting.sentences import protection
from fedllm.runs.record import RunRecord


def privacy(run: RunRecord) -> Html:
    """Return epsilon and the statement, and what they mean."""
    privacy = run.privacy
    if not privacy:
        return html("")
    epsilon, unit = privacy.get("epsilon"), privacy.get("unit")
    if unit == "none":
        head = html('<p class="epsilon">No privacy</p>')
    else:
        words = protection(privacy)
        head = html(
            '<p class="epsilon">ε&nbsp;=&nbsp;{} <small>at δ&nbsp;=&nbsp;{}{}: '
            "protection is <strong>{}</strong></small></p>{}",
            plain(epsilon),
            f"{privacy['delta']:g}",
            " so far" if run.state == "running" else "",
            words,
            _bands(words),
        )
    return html(
        '<section class="privacy">{}<p class="statement">{}</p>{}</section>',
        head,
        privacy["statement"],
        _meaning(privacy),
    )


def _bands(current: str) -> Html:
    """Return the scale of epsilon with the band of this run marked."""
    items, low = [], ""
    for most, word in BANDS:
        here = html(' aria-current="true"' if word == current else "")
        reach = f"ε up to {most:g}" if most < float("inf") else f"ε above {low}"
        items.append(html("<li{}>{}<br>{}</li>", here, word, reach))
        low = f"{most:g}"
    return html(
        '<ol class="bands">{}</ol><p class="soft">Words by {}.</p>',
        join(items),
        BANDS_SOURCE,
    )


def _meaning(privacy: dict[str, Any]) -> Html:
    """Return how often an attacker can be right: an adjective alone would flatter."""
    epsilon, delta = privacy.get("epsilon"), privacy.get("delta")
    if privacy.get("unit") == "none" or epsilon is None or delta is None:
        return html("")
    unit = "one client"
    if privacy["unit"] == "record":
        # A folder from before there were persons names no column.
        is_person = privacy.get("person_column")
        unit = "one person of a client" if is_person else "one record of a client"
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
    note = html(
        '<p class="soft">ε and δ bound any mechanism, so they are the weaker limit; '
        "the noise of this run is Gaussian, for which the exact limit is known.</p>"
    )
    return html(
        "<h3>What the bound allows</h3><p>An attacker knows everything else about the data "
        "and guesses the outcome of a fair coin: whether {unit} was there or not{other}. "
        "Blind guesses are right in 50 % of cases; no method is right more often than "
        "this. (The factor e^{epsilon} is {factor}.)</p>{table}{note}",
        unit=unit,
        other=other,
        epsilon=plain(epsilon),
        factor=_factor(epsilon),
        table=table(head, body),
        note=note if exact else "",
    )


def _factor(epsilon: float) -> str:
    """Return e^epsilon as text, rounded up."""
    if epsilon > 30:
        return "more than a million million"
    factor = math.exp(math.ceil(epsilon * 100 - 1e-9) / 100)
    return f"{math.ceil(factor):,}" if factor >= 100 else f"{factor + 0.005:.2f}"


def audit(run: RunRecord) -> Html:
    """Return the results of an audit."""
    audit = run.audit
    if audit is None:
        return html("")
    rows = [
        [str(check.get("name")), _passed(check.get("passed")), str(check.get("text"))]
        for check in audit.get("checks") or []
        if isinstance(check, dict)
    ]
    bounds = _bounds(audit.get("rehearsal") or audit)
    checks = html(
        "<details><summary>{} checks</summary>{}</details>",
        len(rows),
        table(["Check", "", "Result"], rows, "words"),
    )
    return html(
        "<h2>Audit: {}</h2>{}<p>{}</p>{}",
        _passed(audit.get("passed")),
        table(["Epsilon", "", ""], bounds, "words") if bounds else "",
        audit.get("meaning", ""),
        checks if rows else "",
    )


def _bounds(findings: dict[str, Any]) -> list[list[str]]:
    """Return the accounted, certified and estimated epsilon, as far as they are known."""
    certified, estimate = findings.get("certified"), findings.get("estimate")
    rows = []
    if isinstance(findings.get("accounted"), int | float):
        rows.append(["accounted", plain(findings["accounted"]), "an upper bound"])
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


def not_covered(run: RunRecord) -> Html:
    """Return the list of what the statement does not cover."""
    items = join(html("<li>{}</li>", x) for x in run.privacy.get("not_covered", []))
    shown = html("<h2>Not covered by the statement</h2><ul>{}</ul>", items)
    return shown if items else html("")
