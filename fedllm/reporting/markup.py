"""HTML for the pages of runs and comparisons."""

import html
from collections.abc import Sequence

from fedllm.reporting.style import STYLE


def document(title: str, sections: Sequence[str], head: str = "") -> str:
    """Return a page of sections; empty ones are left out."""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'{head}<link rel="icon" href="data:,">\n<title>{escape(title)}</title>\n'
        f"<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(section for section in sections if section)
        + "\n</main>\n</body>\n</html>\n"
    )


def table(head: list[str], rows: list[list[str]], kind: str = "") -> str:
    """Return a table that scrolls if it is too wide."""

    def row(cells: list[str], tag: str) -> str:
        inner = "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells)
        return f"<tr>{inner}</tr>"

    body = "".join(row(cells, "td") for cells in rows)
    name = f' class="{kind}"' if kind else ""
    return (
        f'<div class="scroll"><table{name}><thead>{row(head, "th")}</thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def escape(value: object) -> str:
    """Return a value as text, escaped for HTML."""
    return html.escape(str(value))
