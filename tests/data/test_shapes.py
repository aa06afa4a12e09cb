"""What a row is, by its own columns."""

import json
from datetime import date
from typing import Any

import pytest

from fedllm.config import DataConfig
from fedllm.data.columns import used_part
from fedllm.data.shapes import Conversation, PlainText, read_row
from fedllm.data.turns import UnusableRowError
from tests.helpers.rows import turn

Q, A = turn("user", "q"), turn("assistant", "a")
CALL = {"id": "1", "function": {"name": "weather", "arguments": '{"city": "Bonn"}'}}
READ_CALL = {
    "type": "function",
    "function": {"name": "weather", "arguments": {"city": "Bonn"}},
    "id": "1",
}


def read(row: dict[str, Any], **settings: Any) -> Conversation | PlainText:
    config = DataConfig(**settings)
    return read_row(config, used_part(config, row))


def turns_of(row: dict[str, Any], **settings: Any) -> list[dict[str, Any]]:
    content = read(row, **settings)
    assert isinstance(content, Conversation)
    return content.turns


SHAPES: dict[str, dict[str, Any]] = {
    "instruction": {"instruction": "q", "response": "a"},
    "alpaca": {"instruction": "q", "input": " ", "output": "a"},
    "case and blanks": {"Instruction": "q", " Response": "a"},
    "prompt and completion": {"prompt": "q", "completion": "a"},
    "question and answer": {"question": "q", "answer": "a", "id": 7},
    "input and output": {"input": "q", "output": "a"},
    "turns": {"prompt": [Q], "completion": [A]},
    "a turn": {"prompt": [Q], "completion": A},
    "messages": {"messages": [Q, A, turn("user", "thanks")]},
    "JSON text": {"messages": json.dumps([Q, A])},
    "parts": {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "q"}]},
            {"role": "assistant", "content": ["a"]},
        ]
    },
    "capitals": {"messages": [turn("User", "q"), turn("Assistant", "a")]},
    "human and gpt": {"messages": [turn("human", "q"), turn("gpt", "a")]},
    "model": {"conversations": [turn("user", "q"), turn("model", "a")]},
    "sharegpt": {
        "conversations": [
            {"from": "human", "value": "q"},
            {"from": "gpt", "value": "a"},
        ]
    },
    "filled by a table": {
        "messages": None,
        "text": None,
        "conversations": [
            {"from": "human", "value": "q", "role": None, "content": None},
            {"from": "gpt", "value": "a", "role": None, "content": None},
        ],
    },
}


@pytest.mark.parametrize("name", SHAPES)
def test_each_shape_is_the_same_conversation(name: str) -> None:
    content = read(SHAPES[name])
    assert isinstance(content, Conversation)
    assert content.turns == [Q, A]
    assert content.learned == (1,)


def test_the_input_of_alpaca_stands_after_the_question() -> None:
    row = {"instruction": "Translate.", "input": "Die Katze.", "output": "The cat."}
    assert turns_of(row)[0]["content"] == "Translate.\n\nDie Katze."
    assert turns_of(row, input_column="")[0]["content"] == "Translate."
    context = {"question": "q", "context": "c", "answer": "a"}
    assert turns_of(context)[0]["content"] == "q\n\nc"
    assert read(context).columns == ("question", "context", "answer")


def test_a_system_column_is_the_system_turn_unless_there_is_one() -> None:
    row = {"system": "Be brief.", "instruction": "q", "response": "a"}
    assert turns_of(row) == [turn("system", "Be brief."), Q, A]
    assert turns_of(row, system_column="") == [Q, A]
    own = [turn("system", "s"), Q, A]
    assert turns_of({"system": "Be brief.", "messages": own}) == own
    content = read({"system": "s", "prompt": [Q, A, Q], "completion": [A]})
    assert isinstance(content, Conversation) and content.learned == (4,)


def test_all_turns_of_the_assistant_are_learned_but_those_of_weight_0() -> None:
    turns = [turn("assistant", "Hello!"), Q, A, Q, A, A]
    content = read({"messages": turns})
    assert isinstance(content, Conversation)
    # Nobody had asked before the first.
    assert content.learned == (2, 4, 5)
    turns[2] = A | {"weight": 0}
    content = read({"messages": turns})
    assert isinstance(content, Conversation) and content.learned == (4, 5)
    assert "weight" not in content.turns[2]


def test_the_prompts_own_answers_are_not_learned() -> None:
    content = read({"prompt": [Q, A, Q], "completion": [A]})
    assert isinstance(content, Conversation) and content.learned == (3,)


def test_tool_calls_are_learned_with_their_arguments_as_objects() -> None:
    asks = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    result = {"role": "tool", "content": {"c": 1}, "tool_call_id": "1"}
    tools = [{"type": "function", "function": {"name": "weather"}}]
    row = {"tools": json.dumps(tools), "messages": [Q, asks]}
    content = read(row)
    assert isinstance(content, Conversation)
    assert content.tools == tools
    assert content.turns[1] == turn("assistant", "") | {"tool_calls": [READ_CALL]}
    with pytest.raises(UnusableRowError, match="a turn's content is not text"):
        read({"messages": [Q, asks, result, A]})
    sharegpt = [
        {"from": "human", "value": "q"},
        {"from": "function_call", "value": json.dumps(CALL["function"])},
        {"from": "observation", "value": "12 degrees"},
        {"from": "gpt", "value": "a"},
    ]
    content = read({"conversations": sharegpt})
    assert isinstance(content, Conversation)
    assert content.learned == (1, 3)
    assert [t["role"] for t in content.turns] == [
        *["user", "assistant", "tool"],
        "assistant",
    ]


def test_text_is_text_only_where_there_is_no_question() -> None:
    assert read({"text": "Once.", "url": "u"}) == PlainText(("text",), "Once.")
    assert turns_of({"text": "x", "instruction": "q", "output": "a"}) == [Q, A]
    row = {"text": "x", "instruction": "q", "output": "a"}
    assert read(row, format="text") == PlainText(("text",), "x")
    assert read({"body": "x"}, text_column="body") == PlainText(("body",), "x")


def test_numbers_and_dates_are_text() -> None:
    assert turns_of({"instruction": "2+2?", "response": 4})[1]["content"] == "4"
    row = {"question": "When?", "answer": date(2024, 1, 2)}
    assert turns_of(row)[1]["content"] == "2024-01-02"


def test_columns_that_the_settings_name_are_the_only_ones() -> None:
    row = {"instruction": "no", "ask": "q", "output": "a", "input": "more"}
    assert turns_of(row, prompt_column="ask", input_column="") == [Q, A]
    with pytest.raises(UnusableRowError, match="no question"):
        read({"instruction": "q", "response": "a"}, prompt_column="ask")


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"instruction": None, "response": "a"}, "no question"),
        ({"instruction": "q", "response": None}, "no answer"),
        ({"instruction": "q", "response": " \n"}, "no answer"),
        ({"instruction": " ", "response": "a"}, "no question"),
        ({"instruction": "q", "response": True}, "column 'response' is not text"),
        ({"instruction": "q", "response": b"a"}, "column 'response' is not text"),
        ({"instruction": "q", "answer": ["a"]}, "column 'answer': a turn without role"),
        ({"messages": []}, "no question"),
        ({"messages": [Q]}, "no turn of the assistant"),
        ({"messages": [A]}, "no question"),
        ({"messages": [Q, turn("assistant", None)]}, "no answer"),
        ({"messages": [Q, {"role": "doctor", "content": "a"}]}, "no turn of the assis"),
        ({"messages": "[{'role': 'user'}]"}, "column 'messages' is not JSON"),
        ({"messages": "[" * 100_000}, "column 'messages' is not JSON"),
        ({"messages": [{"content": "q"}]}, "a turn without role and content"),
        (
            {"messages": [turn("user", [{"type": "image", "url": "u"}]), A]},  # type: ignore[arg-type]
            "a part that is not text",
        ),
        (
            {"messages": [Q, A | {"tool_calls": [{}]}]},
            "without the name of its function",
        ),
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, "a preference"),
        ({"chosen": [Q, A], "rejected": [Q, A]}, "a preference"),
        ({"text": " "}, "no text"),
        ({"id": 7}, "no column that is used has a value"),
    ],
)
def test_a_row_of_which_nothing_is_learned_has_a_reason(
    row: dict[str, Any], reason: str
) -> None:
    with pytest.raises(UnusableRowError, match=reason) as caught:
        read(row)
    assert "\n" not in str(caught.value)
