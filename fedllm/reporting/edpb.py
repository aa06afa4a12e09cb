"""The tests that the EDPB names for models, with the numbers that a run's audit has."""

from collections.abc import Mapping
from typing import Any

from fedllm.privacy.wording import plain
from fedllm.reporting.facts import NOT_KNOWN, Line, Section, fact
from fedllm.runs.record import RunRecord

_UNTRIED = ("Attribute inference", "Model inversion", "Reconstruction")


def edpb_section(run: RunRecord) -> Section:
    """Return the section of tests: extraction, membership, and what was not tried."""
    lines = [
        *_membership(run.audit or {}),
        *_extraction(run.memorised or {}),
        *(Line(f"{name} (fedllm has no such test)", NOT_KNOWN) for name in _UNTRIED),
        Line(
            "Whether the likelihood of extraction is insignificant, with all means "
            "reasonably likely to be used",
            "the controller decides, and the supervisory authority after it",
            "EDPB opinion 28/2024",
        ),
    ]
    return Section(
        "Tests of the model (EDPB opinion 28/2024)",
        lines,
        "A test that found nothing proves nothing about attacks that were not tried.",
    )


def _membership(audit: Mapping[str, Any]) -> list[Line]:
    """Return the membership tests of an audit, at client or at record level."""
    findings = audit.get("rehearsal") or audit
    where = "audit.json: rehearsal." if audit.get("rehearsal") else "audit.json: "
    certified, estimate = findings.get("certified"), findings.get("estimate")
    guesses = bound = reach = None
    if isinstance(certified, Mapping):
        guesses = f"{certified.get('num_correct')} of {certified.get('num_guesses')} guesses right"
        bound = f"{certified['epsilon']:.2f}, with confidence 95 %"
    if isinstance(estimate, Mapping):
        reach = f"{estimate['epsilon']:.2f} ({estimate['low']:.2f} to {estimate['high']:.2f})"
    accounted = findings.get("accounted")
    return [
        fact("Membership: canaries", guesses, f"{where}certified"),
        fact(
            "Membership: certified lower bound of epsilon", bound, f"{where}certified"
        ),
        fact("Membership: estimate of epsilon", reach, f"{where}estimate"),
        fact(
            "Membership: accounted epsilon of the same rounds",
            None if accounted is None else plain(accounted),
            f"{where}accounted",
        ),
    ]


def _extraction(memorised: Mapping[str, Any]) -> list[Line]:
    """Return exposure and verbatim extraction of canary sentences, for each model."""
    models = memorised.get("models")
    if not isinstance(models, Mapping):
        return [
            Line("Extraction: exposure of planted sentences", NOT_KNOWN),
            Line("Extraction: planted sentences recited word by word", NOT_KNOWN),
        ]
    lines = []
    for name, found in models.items():
        lines += [
            fact(
                f"Extraction: exposure, {name}",
                f"{found['exposure']:.2f} bits ({found['exposure_low']:.2f} to "
                f"{found['exposure_high']:.2f}) of at most {memorised['most']:.2f}",
                f"memorised.json: models.{name}.exposure",
            ),
            fact(
                f"Extraction: recited word by word, {name}",
                f"{found['recited']} of {memorised['num_planted']} (95 % interval "
                f"{100 * found['recited_low']:.1f} to {100 * found['recited_high']:.1f} %)",
                f"memorised.json: models.{name}.recited",
            ),
        ]
    return lines
