"""Tables and documents of report.html and compare.html."""

import re

from fedllm.reporting.markup import Html, document, escape, html, join, table

HOSTILE = "<script>alert('1')</script>&\""


def test_a_hostile_value_is_text_wherever_it_enters():
    for page in (
        table([HOSTILE], [[HOSTILE]]),
        document(HOSTILE, []),
        document("", [HOSTILE]),
        document("", [], HOSTILE),
        html("<p>{}</p>", HOSTILE),
        html('<p class="{name}"></p>', name=HOSTILE),
        join([HOSTILE, html("<p></p>")]),
    ):
        assert isinstance(page, Html)
        assert "<script>" not in page
        assert "&lt;script&gt;" in page and "&lt;/script&gt;&amp;&quot;" in page


def test_what_is_html_already_is_not_escaped_again():
    assert html("<p>{}</p>", html("<b>{}</b>", "<")) == "<p><b>&lt;</b></p>"
    assert escape(escape("<")) == "&lt;"


def test_a_value_that_looks_like_a_template_is_text():
    assert html("{}", "{0.__class__} {name}") == "{0.__class__} {name}"


def test_a_page_may_fetch_run_and_send_nothing():
    page = document("", [])
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page)[1]

    assert "default-src &#x27;none&#x27;" in policy
    assert "script-src" not in policy
    assert page.index("Content-Security-Policy") < page.index("<style>")


def test_a_page_leaves_out_empty_sections_and_puts_the_head_first():
    page = document("A run", [], html("<meta name='x'>"))

    assert page.index("<meta name='x'>") < page.index("<title>A run</title>")
    assert "<main>\n<p>one</p>\n<p>two</p>\n</main>" in document(
        "", [html("<p>one</p>"), html(""), html("<p>two</p>")]
    )


def test_a_table_has_a_row_for_each_row_and_its_kind_as_class():
    page = table(["a", "b"], [["1", "2"], ["3", "4"]], "words")

    assert page.count("<tr>") == 3
    assert "<th>a</th><th>b</th>" in page and "<td>3</td><td>4</td>" in page
    assert '<table class="words">' in page
