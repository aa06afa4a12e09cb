"""HTML of the pages: escaped, and without empty sections."""

from fedllm.reporting.markup import document, escape, table


def test_a_hostile_value_is_text_in_a_table_and_in_a_title():
    hostile = "<script>alert('1')</script>&"

    for html in (table([hostile], [[hostile]]), document(hostile, [])):
        assert "<script>" not in html
        assert "&lt;script&gt;" in html and "&lt;/script&gt;&amp;" in html


def test_any_value_is_escaped_as_its_text():
    assert escape(None) == "None"
    assert escape('"') == "&quot;"


def test_a_page_leaves_out_empty_sections_and_puts_the_head_first():
    html = document("A run", ["<p>one</p>", "", "<p>two</p>"], "<meta name='x'>")

    assert "<main>\n<p>one</p>\n<p>two</p>\n</main>" in html
    assert html.index("<meta name='x'>") < html.index("<title>A run</title>")


def test_a_table_has_a_row_for_each_row_and_its_kind_as_class():
    html = table(["a", "b"], [["1", "2"], ["3", "4"]], "words")

    assert html.count("<tr>") == 3
    assert "<th>a</th><th>b</th>" in html and "<td>3</td><td>4</td>" in html
    assert '<table class="words">' in html
