"""Preferences: what rows of two answers are read as, and as which tokens."""

from pathlib import Path
from typing import Any

import pytest

from fedllm.config import DataConfig
from fedllm.data.columns import as_cell
from fedllm.data.overlap import conversation_digest
from fedllm.data.rows import load_rows
from fedllm.data.shapes import Preference, read_row
from fedllm.data.tokens import CUT_AWAY, Tokenized, texts_of, tokenize
from fedllm.data.turns import UnusableRowError
from fedllm.errors import DataError
from fedllm.models.loading import load_tokenizer

DATA = DataConfig(format="preference")


def said(role: str, text: str) -> dict[str, str]:
    return {"role": role, "content": text}


USER = said("user", "Is it cold?")
YES, NO = said("assistant", "Yes, it is."), said("assistant", "Who knows?")
WANTED = ([USER, YES], [USER, NO])

SAME_PAIR = {
    "plain": {
        "prompt": USER["content"],
        "chosen": YES["content"],
        "rejected": NO["content"],
    },
    "instruction": {
        "instruction": USER["content"],
        "chosen": YES["content"],
        "rejected": NO["content"],
    },
    "conversational": {"prompt": [USER], "chosen": [YES], "rejected": [NO]},
    "one turn without a list": {"prompt": [USER], "chosen": YES, "rejected": NO},
    "implicit": {"chosen": [USER, YES], "rejected": [USER, NO]},
    "implicit, and the prompt once more": {
        "prompt": USER["content"],
        "chosen": [USER, YES],
        "rejected": [USER, NO],
    },
    "ShareGPT": {
        "chosen": [
            {"from": "human", "value": USER["content"]},
            {"from": "gpt", "value": YES["content"]},
        ],
        "rejected": [
            {"from": "human", "value": USER["content"]},
            {"from": "gpt", "value": NO["content"]},
        ],
    },
    "cells of a data set": {
        "chosen": as_cell([USER, YES]),
        "rejected": as_cell([USER, NO]),
    },
    "transcripts": {
        "chosen": "\n\nHuman: Is it cold?\n\nAssistant: Yes, it is.",
        "rejected": "\n\nHuman: Is it cold?\n\nAssistant: Who knows?",
    },
    "one text that begins alike": {
        "chosen": "Is it cold? Yes, it is.",
        "rejected": "Is it cold? Who knows?",
    },
}


def pair(row: dict[str, Any], config: DataConfig = DATA) -> Preference:
    found = read_row(config, row)
    assert isinstance(found, Preference)
    return found


@pytest.mark.parametrize("row", SAME_PAIR.values(), ids=SAME_PAIR)
def test_a_pair_is_read_alike_in_whatever_form_it_is_written(row):
    found = pair(row)

    assert (found.chosen.turns, found.rejected.turns) == WANTED
    assert found.chosen.learned == found.rejected.learned == (1,)
    assert {"chosen", "rejected"} <= {*found.columns}


def test_what_both_share_is_not_learned_of_several_turns(capsys):
    first = said("assistant", "Where?")
    here = said("user", "Here.")

    found = pair({"chosen": [USER, first, here, YES], "rejected": [USER, first, NO]})

    assert found.chosen.learned == (3,)
    assert found.rejected.learned == (2,)


def test_a_system_column_and_an_input_belong_to_both():
    row = {"instruction": "Translate.", "input": "kalt", "system": "Be brief."}

    found = pair(row | {"chosen": "cold", "rejected": "warm"})

    for side in (found.chosen, found.rejected):
        assert side.turns[0] == said("system", "Be brief.")
        assert side.turns[1]["content"] == "Translate.\n\nkalt"
    assert found.columns == (
        "instruction",
        "input",
        "chosen",
        "rejected",
        "system",
    )


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "a", "chosen": "b"}, "no rejected answer"),
        ({"prompt": "a"}, "no chosen and no rejected answer"),
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "are the same"),
        ({"prompt": "a", "chosen": "b", "rejected": " "}, "rejected: no answer"),
        ({"prompt": "", "chosen": "b", "rejected": "c"}, "no question"),
        ({"chosen": "b", "rejected": "c"}, "do not begin alike"),
        ({"chosen": [YES], "rejected": [NO]}, "do not begin alike"),
        ({"chosen": [USER, YES], "rejected": [USER]}, "rejected: no"),
        ({"prompt": "a", "chosen": 1.5, "rejected": True}, "not text"),
    ],
)
def test_a_row_without_two_answers_to_one_question_says_why(row, reason):
    with pytest.raises(UnusableRowError, match=reason):
        read_row(DATA, row)


def test_without_the_objective_preferences_are_no_answers_as_before():
    with pytest.raises(UnusableRowError, match="there is no answer to learn"):
        read_row(DataConfig(), SAME_PAIR["plain"])


def test_rows_without_the_columns_are_refused_in_one_line(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"instruction": "a", "response": "b"}\n')

    with pytest.raises(DataError, match="dpo needs prompt, chosen, rejected") as caught:
        load_rows(DATA, str(path))

    assert "instruction, response" in str(caught.value)


def test_a_pair_is_another_with_another_rejected_answer():
    row = SAME_PAIR["plain"]
    digest = conversation_digest(DATA, row)

    assert digest == conversation_digest(DATA, SAME_PAIR["implicit"])
    assert digest != conversation_digest(DATA, row | {"rejected": "Perhaps."})
    assert digest is not None


def tokens(
    folder: Path, *rows: dict[str, Any], limit: int = 512, **settings: Any
) -> Tokenized:
    data = DataConfig(format="preference", **settings)
    return tokenize(rows, load_tokenizer(str(folder)), data, limit)


def learned(folder: Path, example: Any) -> list[str]:
    tokenizer = load_tokenizer(str(folder))
    return [
        tokenizer.decode([label for label in text["labels"] if label >= 0])
        for text in texts_of(example)
    ]


@pytest.mark.parametrize(
    ("model", "beginnings"), [("tiny_chat_llama", 0), ("tiny_llama", 1)]
)
def test_both_answers_are_learned_to_their_end_after_no_doubled_beginning_of_text(
    request, model, beginnings
):
    folder = request.getfixturevalue(model)
    tokenizer = load_tokenizer(str(folder))

    found = tokens(folder, SAME_PAIR["plain"])

    (example,) = found.records
    for answer, text in zip(
        ("Yes, it is.", "Who knows?"), texts_of(example), strict=True
    ):
        ids = text["input_ids"]
        assert len(ids) == len(text["labels"])
        assert ids.count(tokenizer.bos_token_id) == beginnings
        assert tokenizer.eos_token_id in text["labels"]
        whole = [label for label in text["labels"] if label >= 0]
        assert answer in tokenizer.decode(whole)
        assert "cold" not in tokenizer.decode(whole)
    assert found.columns == {("prompt", "chosen", "rejected"): 1}


def test_both_are_compared_from_one_token_on(tiny_chat_llama):
    (example,) = tokens(tiny_chat_llama, SAME_PAIR["plain"]).records

    chosen, rejected = texts_of(example)

    first = [
        next(i for i, x in enumerate(t["labels"]) if x >= 0) for t in (chosen, rejected)
    ]
    assert first[0] == first[1]
    assert chosen["input_ids"][: first[0]] == rejected["input_ids"][: first[0]]


def test_the_length_limit_holds_for_both_answers(tiny_chat_llama):
    row = SAME_PAIR["plain"] | {"rejected": "Who knows that? " * 40}
    (short,) = tokens(tiny_chat_llama, SAME_PAIR["plain"]).records
    limit = len(short["chosen_ids"]) + 4

    found = tokens(tiny_chat_llama, row, limit=limit)

    (example,) = found.records
    assert len(example["rejected_ids"]) == len(example["rejected_labels"]) == limit
    assert len(example["chosen_ids"]) <= limit
    assert found.truncated == [0]


def test_an_answer_beyond_the_limit_makes_no_pair(tiny_chat_llama):
    found = tokens(tiny_chat_llama, SAME_PAIR["plain"], limit=8)

    assert found.records == [None]
    assert found.unusable == {CUT_AWAY: [0]}


def test_answers_that_differ_beyond_the_limit_make_no_pair(tiny_chat_llama):
    row = {"prompt": "a", "chosen": "Who knows that? " * 40, "rejected": ""}
    row["rejected"] = row["chosen"] + "Nobody."

    found = tokens(tiny_chat_llama, row, limit=60)

    assert list(found.unusable) == [
        "chosen and rejected are the same within train.max-length"
    ]


def test_a_question_that_is_cut_is_cut_alike_in_both(tiny_chat_llama):
    row = SAME_PAIR["plain"] | {"prompt": "Is it cold? " * 30}

    found = tokens(tiny_chat_llama, row, limit=60, long_questions="cut-left")

    (example,) = found.records
    chosen, rejected = texts_of(example)
    first = next(i for i, x in enumerate(chosen["labels"]) if x >= 0)
    assert chosen["input_ids"][:first] == rejected["input_ids"][:first]
    assert max(len(chosen["input_ids"]), len(rejected["input_ids"])) == 60
    assert found.cut_left == [0]
    assert [x for x in learned(tiny_chat_llama, example) if "cold" in x] == []


def test_a_pair_is_a_function_of_its_row_alone(tiny_chat_llama):
    alone = tokens(tiny_chat_llama, SAME_PAIR["plain"]).records
    broken = {"chosen": 5}

    among = tokens(tiny_chat_llama, broken, SAME_PAIR["plain"], SAME_PAIR["implicit"])

    assert among.records == [None, *alone, *alone]
