"""What the base model makes of rows is seen before a run."""

import json

import pytest

from fedllm.deployment.rendered_rows import marked
from fedllm.models.loading import load_tokenizer
from tests.helpers.doctor import examined
from tests.helpers.rows import turn, write_jsonl
from tests.helpers.tiny_models import CHAT_TEMPLATE, save_llama

TURNS = [turn("user", "q"), turn("assistant", "a")]


@pytest.fixture(scope="module")
def own_llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("own-llama")
    save_llama(folder)
    return folder


@pytest.fixture
def looked_at(capsys, typed, own_llama, tmp_path):
    def looked_at(template, *rows, **settings):
        (own_llama / "chat_template.jinja").write_text(template)
        path = write_jsonl(tmp_path / "own.jsonl", list(rows))
        names = {"data.name": str(path), "model.name": str(own_llama)}
        changes = {k.replace("__", "."): v for k, v in settings.items()}
        return examined(capsys, typed | names | changes)

    return looked_at


def test_three_rows_are_shown_with_marks_around_what_is_learned(looked_at):
    rows = [{"messages": [*TURNS, *TURNS]}] * 5

    status, checks = looked_at(CHAT_TEMPLATE, *rows)

    assert status == 0
    assert checks["template"]["text"] == "5 of 5 rows can be learned from"
    assert [name for name in checks if name.startswith("row ")] == [
        "row 1",
        "row 2",
        "row 3",
    ]
    assert checks["row 1"]["text"] == (
        "<|user|>\\x0aq</s>\\x0a<|assistant|>\\x0a>>>a</s>\\x0a<<<"
        "<|user|>\\x0aq</s>\\x0a<|assistant|>\\x0a>>>a</s>\\x0a<<<"
    )


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (CHAT_TEMPLATE.replace("{{ eos_token }}", ""), "no end of the answer"),
        ("{{ raise_exception('no') }}", "template rejects it: TemplateError: no"),
        (
            CHAT_TEMPLATE.replace("message['content']", "message.x"),
            "leaves out the first",
        ),
    ],
)
def test_a_template_that_no_row_survives_fails(looked_at, template, words):
    status, checks = looked_at(template, {"messages": TURNS})

    assert status == 1
    assert checks["template"]["level"] == "FAIL"
    assert words in checks["template"]["text"]


def test_fewer_positions_than_the_length_limit_fail(looked_at):
    row = {"messages": TURNS}
    status, checks = looked_at(CHAT_TEMPLATE, row, **{"train__max-length": 4096})

    assert status == 1
    assert "train.max-length: must be at most 2048" in checks["template"]["text"]


def test_a_tokenizer_of_another_model_fails(looked_at, own_llama):
    path = own_llama / "config.json"
    whole = path.read_text()
    path.write_text(json.dumps(json.loads(whole) | {"vocab_size": 8}))
    try:
        _, checks = looked_at(CHAT_TEMPLATE, {"messages": TURNS})
    finally:
        path.write_text(whole)

    assert checks["template"]["level"] == "FAIL"
    assert "beyond the model's embedding" in checks["template"]["text"]


def test_a_row_is_shown_as_text_that_can_be_seen_and_is_cut(tiny_llama):
    tokenizer = load_tokenizer(str(tiny_llama))
    ids = tokenizer("a\x1b[2J" + "b " * 900)["input_ids"]

    text = marked(tokenizer, {"input_ids": ids, "labels": [-100, *ids[1:]]})

    assert "\\x1b" in text and "\x1b" not in text
    assert " ... " in text and len(text) < 800
