"""Exact match, ROUGE-L and the embedded off-topic questions."""

from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedllm.errors import DataError
from fedllm.evaluation.open_answers import (
    load_open_questions,
    off_topic_rows,
    rouge_l,
    score_answers,
)

WORDS = st.lists(st.sampled_from("abc"), max_size=7)


@given(WORDS, WORDS)
def test_rouge_l_is_the_f1_of_the_longest_common_subsequence(answer, reference):
    def parts(words):
        return {p for n in range(len(words) + 1) for p in combinations(words, n)}

    common = max(len(part) for part in parts(answer) & parts(reference))
    precision = common / max(len(answer), 1)
    recall = common / max(len(reference), 1)
    f1 = 2 * precision * recall / (precision + recall) if common else 0.0
    assert rouge_l(answer, reference) == pytest.approx(f1)


def test_case_and_punctuation_do_not_count():
    score = score_answers(["The Nile.", "red blue"], ["the nile", "red green"])
    assert (score.exact_match, score.rouge_l, score.num_questions) == (0.5, 0.75, 2)


def test_a_malformed_open_question_names_its_line(tmp_path):
    path = tmp_path / "open.jsonl"
    path.write_text(
        '{"question": "a", "answer": "b"}\n{"question": "a", "answer": 1}\n'
    )
    with pytest.raises(DataError, match=r"open.jsonl:2: needs question and answer"):
        load_open_questions(path)


def test_the_off_topic_questions_are_distinct_and_answered():
    rows = off_topic_rows()
    assert len({row["question"] for row in rows}) == len(rows) == 40
    assert all(row["question"].endswith("?") and row["answer"] for row in rows)
