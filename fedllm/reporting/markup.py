"""HTML for the pages of runs and comparisons: what is not `Html` is escaped where it enters.

A run folder may come from a stranger, and any value in it may be text with tags. So pages
are built from `Html` alone, and only `html` makes it: forgetting to escape is not possible,
since no caller does.
"""

import html as standard
from collections.abc import Iterable, Sequence
from typing import LiteralString

from fedllm.reporting.style import STYLE

# Nothing is fetched, run or sent, whatever a page holds: its style and drawings are in it.
_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; img-src data:; "
    "base-uri 'none'; form-action 'none'"
)


class Html(str):
    """Text that is HTML already. Only this module and matplotlib's drawings make it."""

    __slots__ = ()


def html(template: LiteralString, *values: object, **named: object) -> Html:
    """Fill a template of ours with values, each escaped unless it is `Html`.

    Args:
        template: HTML with `{}` and `{name}` for the values, in an element or in quotes.
        values: The values, as text; a number is formatted by the caller.
        named: As values, by name.
    """
    filled = template.format(
        *(escape(value) for value in values),
        **{name: escape(value) for name, value in named.items()},
    )
    return Html(filled)


def join(parts: Iterable[object], between: LiteralString = "") -> Html:
    """Return parts one after the other, each escaped unless it is `Html`."""
    return Html(between.join(escape(part) for part in parts))


def escape(value: object) -> Html:
    """Return a value as text, escaped for HTML unless it is `Html`."""
    return value if isinstance(value, Html) else Html(standard.escape(str(value)))


def document(title: str, sections: Sequence[object], head: object = "") -> Html:
    """Return a page of sections; empty ones are left out."""
    return html(
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '{head}<link rel="icon" href="data:,">\n<title>{title}</title>\n'
        "<style>{style}</style>\n</head>\n<body>\n<main>\n{body}\n</main>\n</body>\n"
        "</html>\n",
        policy=_POLICY,
        head=head,
        title=title,
        style=Html(STYLE),
        body=join((section for section in sections if section), "\n"),
    )


def table(
    head: Sequence[object], rows: Sequence[Sequence[object]], kind: str = ""
) -> Html:
    """Return a table that scrolls if it is too wide."""

    def row(cells: Sequence[object], cell: LiteralString) -> Html:
        return html("<tr>{}</tr>", join(html(cell, value) for value in cells))

    return html(
        '<div class="scroll"><table{}><thead>{}</thead><tbody>{}</tbody></table></div>',
        html(' class="{}"', kind) if kind else "",
        row(head, "<th>{}</th>"),
        join(row(cells, "<td>{}</td>") for cells in rows),
    )
