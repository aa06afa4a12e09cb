"""Lines of a dossier: a fact, and the file and key that it comes from."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedllm.foreign_text import printable
from fedllm.reporting.markup import Html, html, join

NOT_KNOWN = "not known"
_MOST_OF_A_VALUE = 4000


@dataclass(frozen=True)
class Line:
    """A fact.

    Attributes:
        name: What it is about.
        value: The fact, or NOT_KNOWN.
        source: File and key, or how else it is known; empty if it is not known.
    """

    name: str
    value: str
    source: str = ""


@dataclass(frozen=True)
class Section:
    """Facts under one heading.

    Attributes:
        title: The heading.
        lines: The facts.
        note: A sentence above them.
    """

    title: str
    lines: Sequence[Line]
    note: str = ""


def fact(name: str, value: object, source: str) -> Line:
    """Return a line; without a value the fact is not known, and has no source."""
    if value is None or value == "":
        return Line(name, NOT_KNOWN)
    return Line(name, printable(value, _MOST_OF_A_VALUE), source)


def of_file(
    name: str, content: Mapping[str, Any], file: str, key: str, form: str = "{}"
) -> Line:
    """Return the line of one key of a file.

    Args:
        name: What it is about.
        content: The file's content.
        file: The file's name.
        key: The key.
        form: How the value is shown.
    """
    value = content.get(key)
    shown = None if value is None or value == "" else form.format(value)
    return fact(name, shown, f"{file}: {key}")


def section_html(section: Section) -> Html:
    """Return a section of a page."""
    note = html("<p>{}</p>", section.note) if section.note else html("")
    lines = join(
        html(
            '<div><dt>{}</dt><dd{}>{}<span class="source">{}</span></dd></div>',
            line.name,
            html(' class="unknown"') if line.value == NOT_KNOWN else "",
            line.value,
            line.source,
        )
        for line in section.lines
    )
    return html('<h2>{}</h2>{}<dl class="facts">{}</dl>', section.title, note, lines)
