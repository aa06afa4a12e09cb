"""A line without a value is not known, and has no source."""

import pytest

from fedllm.reporting.facts import NOT_KNOWN, Line, Section, fact, of_file, section_html


@pytest.mark.parametrize("value", [None, ""])
def test_a_fact_without_a_value_is_not_known(value):
    assert fact("a", value, "file: key") == Line("a", NOT_KNOWN)
    assert of_file("a", {"key": value}, "file", "key") == Line("a", NOT_KNOWN)


def test_a_key_of_a_file_names_both():
    assert of_file("a", {"k": 0.5}, "file", "k", "{:g}") == Line("a", "0.5", "file: k")


def test_what_a_strangers_file_says_is_text_on_the_page():
    line = fact("<b>", "<script>\x1b", "f")
    shown = section_html(Section("t", [line], "<i>"))

    assert "<script>" not in shown and "<b>" not in shown and "<i>" not in shown
    assert "\x1b" not in shown
