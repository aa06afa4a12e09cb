"""Multiple choice against a plain loop, and files of questions."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest
from transformers import PreTrainedConfig

from fedllm.errors import DataError
from fedllm.evaluation.multiple_choice import _wilson, load_questions, multiple_choice
from tests.helpers.examples import plain_losses


class LastToken(torch.nn.Module):
    """Its state is the token."""

    def __init__(self, num_embeddings: int) -> None:
        super().__init__()
        self.num_embeddings = num_embeddings

    def forward(self, input_ids: torch.Tensor, **_: Any) -> Any:
        tokens = torch.nn.functional.one_hot(input_ids, self.num_embeddings)
        return SimpleNamespace(last_hidden_state=tokens.float())


class Bigram(torch.nn.Module):
    """A model whose next token depends on the last one by a table of our own."""

    config = PreTrainedConfig()

    def __init__(self, probabilities: list[list[float]]) -> None:
        super().__init__()
        table = torch.tensor(probabilities).log()
        self.head = torch.nn.Linear(len(table), len(table), bias=False)
        self.head.weight.data = table.T.contiguous()

        self.base_model = LastToken(len(table))

    def forward(self, input_ids: torch.Tensor, **_: Any) -> Any:
        states = self.base_model(input_ids=input_ids).last_hidden_state
        return SimpleNamespace(logits=self.head(states))

    def get_input_embeddings(self) -> Any:
        return self.base_model

    def get_output_embeddings(self) -> Any:
        return self.head


class Letters:
    """A tokenizer for words of a, b, c, d."""

    pad_token_id = 3

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        assert not add_special_tokens
        return {"input_ids": ["abcd".index(letter) for letter in text]}


# After a: b is likely; after b: c is nearly sure.
RIGGED = Bigram(
    [
        [0.10, 0.40, 0.45, 0.05],
        [0.03, 0.03, 0.90, 0.04],
        [0.25, 0.25, 0.25, 0.25],
        [0.25, 0.25, 0.25, 0.25],
    ]
)


def test_multiple_choice_takes_the_highest_mean_log_probability_per_token():
    # Of the options after "a", "c" has the highest total (0.45), "bc" the highest mean
    # (sqrt(0.4 * 0.9) = 0.6).
    questions = [
        {"question": "da", "options": ["c", "bc", "d"], "answer": 1},
        {"question": "da", "options": ["c", "bc", "d"], "answer": 0},
        {"question": "a", "options": ["d", "a", "b"], "answer": 2},
        {"question": "b", "options": ["a", "c"], "answer": 1},
    ]

    got = multiple_choice(RIGGED, Letters(), questions, lambda question: question)

    assert (got.accuracy, got.num_questions) == (0.75, 4)
    assert got.chance == pytest.approx((3 / 3 + 1 / 2) / 4)
    assert got.interval[0] < 0.75 < got.interval[1]


def test_the_second_accuracy_takes_the_mean_per_byte():
    # Seen through another alphabet: options of one token each and of 1 and 6 bytes.
    class Words(Letters):
        def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
            return super().__call__(text.replace("\u00e4\u00e4\u00e4", "b"), False)

    # After "a", "c" has 0.45 for one byte, what stands for "b" 0.40 for six.
    questions = [
        {"question": "a", "options": ["c", "\u00e4\u00e4\u00e4"], "answer": k}
        for k in (0, 0, 1)
    ]

    got = multiple_choice(RIGGED, Words(), questions, lambda question: question)

    assert got.accuracy == pytest.approx(2 / 3)
    assert got.accuracy_per_byte == pytest.approx(1 / 3)


def test_the_prompt_is_the_template_around_the_question():
    questions = [{"question": "x", "options": ["d", "c"], "answer": 1}]

    got = multiple_choice(RIGGED, Letters(), questions, {"x": "ab"}.__getitem__)

    assert got.accuracy == 1.0


def test_multiple_choice_on_a_real_model_is_a_plain_loop(model, tokenizer):
    questions = [
        {
            "question": f"What is {name}?",
            "options": ["A bone.", "A vaccine", "x"],
            "answer": k,
        }
        for k, name in enumerate(["the femur", "asthma", "an allergy"])
    ]
    right = 0
    for row in questions:
        means = []
        for option in row["options"]:
            parts = [
                tokenizer(text, add_special_tokens=False)["input_ids"]
                for text in (row["question"], option)
            ]
            labels = [-100] * len(parts[0]) + parts[1]
            example = {"input_ids": parts[0] + parts[1], "labels": labels}
            means.append(np.mean(plain_losses(model, [example])))
        right += int(np.argmin(means)) == row["answer"]

    got = multiple_choice(model, tokenizer, questions, lambda question: question)

    assert got.accuracy == right / 3


@given(st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_the_interval_is_wilsons(case):
    right, n = case
    wanted = binomtest(right, n).proportion_ci(confidence_level=0.95, method="wilson")

    low, high = _wilson(right, n)

    assert low == pytest.approx(wanted.low, abs=1e-6)
    assert high == pytest.approx(wanted.high, abs=1e-6)


GOOD = {"question": "q", "options": ["a", "b"], "answer": 1}


def write(path: Path, *rows: Any) -> Path:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_questions_are_read_and_blank_lines_ignored(tmp_path):
    path = write(tmp_path / "q.jsonl", GOOD, "", {**GOOD, "more": 1})

    assert [row["answer"] for row in load_questions(path)] == [1, 1]


def test_a_question_with_an_unusual_line_separator_is_one_line(tmp_path):
    row = json.dumps({**GOOD, "question": "one\u2028two\x85three"}, ensure_ascii=False)

    assert len(load_questions(write(tmp_path / "q.jsonl", row))) == 1


@pytest.mark.parametrize(
    "bad",
    [
        "{",
        "[]",
        "null",
        "3",
        {"options": ["a", "b"], "answer": 1},
        {**GOOD, "question": 3},
        {**GOOD, "options": ["a"], "answer": 0},
        {**GOOD, "options": ["a", 3]},
        {**GOOD, "options": ["a", ""]},
        {**GOOD, "options": "ab"},
        {**GOOD, "options": {"a": 1, "b": 2}},
        {**GOOD, "options": None},
        {**GOOD, "answer": 2},
        {**GOOD, "answer": -1},
        {**GOOD, "answer": "b"},
        {**GOOD, "answer": 1.0},
        {**GOOD, "answer": True},
    ],
)
def test_a_malformed_question_is_named_by_its_line(tmp_path, bad):
    path = write(tmp_path / "q.jsonl", GOOD, "", bad, GOOD)

    with pytest.raises(DataError, match=r"q\.jsonl:3: needs question"):
        load_questions(path)


def test_a_question_file_that_is_missing_empty_or_no_text_is_one_line(tmp_path):
    with pytest.raises(DataError, match="cannot be read"):
        load_questions(tmp_path / "none.jsonl")
    with pytest.raises(DataError, match="has no question"):
        load_questions(write(tmp_path / "empty.jsonl", "", " "))
    (tmp_path / "latin.jsonl").write_bytes(b'{"question": "\xe9"}')
    with pytest.raises(DataError):
        load_questions(tmp_path / "latin.jsonl")
