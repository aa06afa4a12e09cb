"""A checker of report.html: valid, closed, and without the network."""

import re
from html.parser import HTMLParser

from fedllm.reporting.report import write_report

VOID = {"meta", "link", "br", "path", "use", "rect"}


class Checker(HTMLParser):
    """Finds what is not closed, ids twice, and anything that would be fetched."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.wrong: list[str] = []
        self.ids: set[str] = set()
        self.links: set[str] = set()
        self.tags: set[str] = set()
        self.text: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        if tag not in VOID:
            self.open.append(tag)
        for key, value in attrs:
            if key == "id":
                if value in self.ids:
                    self.wrong.append(f"id {value} twice")
                self.ids.add(value)
            if key in ("href", "src", "xlink:href", "action"):
                self.links.add(value)
            if "://" in (value or ""):
                self.wrong.append(f"{tag} {key}={value}")

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        if tag in VOID:
            return
        if not self.open or self.open.pop() != tag:
            self.wrong.append(f"</{tag}> out of place")

    def handle_data(self, data):
        if "style" not in self.open:
            self.text.append(data)


def check(folder):
    """Write the page, and return what stands in it."""
    write_report(folder)
    page = (folder / "report.html").read_text()
    checker = Checker()
    checker.feed(page)
    checker.close()
    assert checker.wrong == [] and checker.open == []
    assert not checker.tags & {"script", "iframe", "img", "object", "base"}
    for link in checker.links:
        assert link == "data:," or link[1:] in checker.ids, link
    assert "url(" not in re.sub(r"url\(#[\w-]+\)", "", page)
    assert "@import" not in page
    return page, " ".join(" ".join(checker.text).split())
