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
from fedllm.reporting.markup import escape, table
from fedllm.reporting.sentences import protection
from fedllm.runs.record import RunRecord


def privacy(run: RunRecord) -> str:
    """Return epsilon and the statement, and what they mean."""
    privacy = run.privacy
    if not privacy:
        return ""
    epsilon, unit = privacy.get("epsilon"), privacy.get("unit")
    if unit == "none":
        head = '<p class="epsilon">No privacy</p>'
    else:
        words = protection(privacy)
        so_far = " so far" if run.state == "running" else ""
        head = (
            f'<p class="epsilon">ε&nbsp;=&nbsp;{escape(plain(epsilon))} <small>at '
            f"δ&nbsp;=&nbsp;{privacy['delta']:g}{so_far}: protection is "
            f"<strong>{words}</strong></small></p>{_bands(words)}"
        )
    statement = f'<p class="statement">{escape(privacy["statement"])}</p>'
    return f'<section class="privacy">{head}{statement}{_meaning(privacy)}</section>'


def _bands(current: str) -> str:
    """Return the scale of epsilon with the band of this run marked."""
    items, low = [], ""
    for most, word in BANDS:
        here = ' aria-current="true"' if word == current else ""
        reach = f"ε up to {most:g}" if most < float("inf") else f"ε above {low}"
        items.append(f"<li{here}>{word}<br>{reach}</li>")
        low = f"{most:g}"
    source = f'<p class="soft">Words by {escape(BANDS_SOURCE)}.</p>'
    return f'<ol class="bands">{"".join(items)}</ol>{source}'


def _meaning(privacy: dict[str, Any]) -> str:
    """Return how often an attacker can be right: an adjective alone would flatter."""
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
        "<h3>What the bound allows</h3><p>An attacker knows everything else about the data "
        f"and guesses the outcome of a fair coin: whether {unit} was there or not{other}. "
        "Blind guesses are right in 50 % of cases; no method is right more often than "
        "this. (The factor "
        f"e^{escape(plain(epsilon))} is {_factor(epsilon)}.)</p>{table(head, body)}"
        + (
            '<p class="soft">ε and δ bound any mechanism, so they are the weaker limit; '
            "the noise of this run is Gaussian, for which the exact limit is known.</p>"
            if exact
            else ""
        )
    )


def _factor(epsilon: float) -> str:
    """Return e^epsilon as text, rounded up."""
    if epsilon > 30:
        return "more than a million million"
    factor = math.exp(math.ceil(epsilon * 100 - 1e-9) / 100)
    return f"{math.ceil(factor):,}" if factor >= 100 else f"{factor + 0.005:.2f}"


def audit(run: RunRecord) -> str:
    """Return the results of an audit."""
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
        + f"<p>{escape(audit.get('meaning', ''))}</p>"
        + (
            f"<details><summary>{len(rows)} checks</summary>"
            f"{table(['Check', '', 'Result'], rows, 'words')}</details>"
            if rows
            else ""
        )
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


def not_covered(run: RunRecord) -> str:
    """Return the list of what the statement does not cover."""
    items = "".join(f"<li>{escape(x)}</li>" for x in run.privacy.get("not_covered", []))
    return f"<h2>Not covered by the statement</h2><ul>{items}</ul>" if items else ""
