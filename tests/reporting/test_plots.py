"""Plots of a run: the page's colours, and few bytes."""

import re

from tests.helpers.pages import check
from tests.helpers.sample_runs import write_run


def test_colours_are_the_pages_own(tmp_path):
    page, _ = check(write_run(tmp_path / "run"))

    svg = "".join(re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL))
    assert not re.findall(r"#[0-9a-f]{6}\b", svg)
    assert "var(--s1)" in svg and "currentColor" in svg
    assert "prefers-color-scheme: dark" in page


def test_many_rounds_are_drawn_as_lines(tmp_path):
    page, _ = check(write_run(tmp_path / "run", rounds=50, num_server_rounds=50))

    assert len(page) < 150_000
