import json
import math
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest
from transformers import AutoModelForCausalLM, PreTrainedConfig

from fedllm.adapters.peft_model import attach, set_trained
from fedllm.adapters.resolve import adapter_spec
from fedllm.config import AdapterConfig
from fedllm.errors import DataError
from fedllm.evaluation import generation, held_out_loss
from fedllm.evaluation.generation import generate, generate_together
from fedllm.evaluation.held_out_loss import HeldOut, held_out
from fedllm.evaluation.multiple_choice import _wilson, load_questions, multiple_choice
from fedllm.models import answer_loss
from fedllm.models.answer_loss import answer_losses, collate
from fedllm.models.loading import load_tokenizer


@pytest.fixture(scope="module")
def model(tiny_chat_llama: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_chat_llama, dtype=torch.float32)


@pytest.fixture(scope="module")
def tokenizer(tiny_chat_llama: Path) -> Any:
    return load_tokenizer(str(tiny_chat_llama))


def make_examples(count: int = 12, seed: int = 0) -> list[dict[str, Any]]:
    """Return examples of uneven length, some with a gap in the answer."""
    draw = np.random.default_rng(seed)
    examples = []
    for _ in range(count):
        size = int(draw.integers(4, 40))
        ids = draw.integers(2, 384, size).tolist()
        start = int(draw.integers(1, size))
        labels = [-100] * start + ids[start:]
        if size - start > 3:
            labels[start + 1] = -100
        examples.append({"input_ids": ids, "labels": labels})
    return examples


def plain_losses(model: Any, examples: list[dict[str, Any]]) -> list[float]:
    """Score answer tokens one example at a time, from the full logits."""
    losses = []
    for example in examples:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([example["input_ids"]])).logits[0]
        scores = torch.log_softmax(logits.double(), -1)
        for place, label in enumerate(example["labels"]):
            if label != -100:
                losses.append(-float(scores[place - 1, label]))
    return losses


def test_the_held_out_loss_is_that_of_a_plain_loop_over_full_logits(model):
    examples = make_examples()
    wanted = plain_losses(model, examples)

    got = held_out(model, examples, 0)

    assert got.loss == pytest.approx(sum(wanted) / len(wanted), rel=1e-5)
    assert (got.num_examples, got.num_tokens) == (12, len(wanted))
    assert got.perplexity == pytest.approx(math.exp(got.loss))


def test_the_loss_goes_through_the_adapter_that_is_on(tiny_chat_llama):
    base = AutoModelForCausalLM.from_pretrained(tiny_chat_llama, dtype=torch.float32)
    spec = adapter_spec(AdapterConfig(rank=4), base.config, 5)
    tuned = attach(base, spec)
    draw = np.random.default_rng(0)
    values = {n: draw.normal(0, 1, s) for n, s in spec.trained_shapes.items()}
    set_trained(tuned, spec, values)
    examples = make_examples()
    wanted = plain_losses(tuned.eval(), examples)

    got = held_out(tuned, examples, 0)
    with tuned.disable_adapter():
        without = held_out(tuned, examples, 0)

    assert got.loss == pytest.approx(sum(wanted) / len(wanted), rel=1e-5)
    assert abs(got.loss - without.loss) > 1e-3


@pytest.mark.parametrize("pad", [0, 1, 2, 383])
def test_the_padding_id_does_not_matter_even_where_it_ends_answers(model, pad):
    examples = make_examples()
    for example in examples:
        example["input_ids"][-1] = example["labels"][-1] = 2
    wanted = plain_losses(model, examples)

    assert held_out(model, examples, pad).loss == pytest.approx(
        sum(wanted) / len(wanted), rel=1e-5
    )


def test_how_examples_are_batched_and_ordered_does_not_matter(model, monkeypatch):
    examples = make_examples()
    together = held_out(model, examples, 0)

    monkeypatch.setattr(held_out_loss, "_TOKENS_PER_BATCH", 1)
    alone = held_out(model, examples[::-1], 0)

    assert alone.loss == pytest.approx(together.loss, rel=1e-5)
    assert (alone.num_examples, alone.num_tokens) == (12, together.num_tokens)


def test_a_batch_never_holds_more_tokens_than_allowed_but_for_one_long_example(model):
    examples = [
        {"input_ids": [5] * n, "labels": [5] * n} for n in (700, 700, 700, 3000)
    ]

    sizes = [len(batch) for batch in held_out_loss._batches(examples)]

    assert sizes == [2, 1, 1]


def test_held_out_leaves_no_gradient_and_eval_mode(model):
    model.train()

    held_out(model, make_examples(2), 0)

    assert not model.training
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("labels", [[-100] * 4, [7, -100, -100, -100]])
def test_nothing_to_score_is_said(model, labels):
    with pytest.raises(DataError, match="no answer token"):
        held_out(model, [{"input_ids": [7, 8, 9, 10], "labels": labels}], 0)
    with pytest.raises(DataError, match="no answer token"):
        held_out(model, [], 0)


def test_a_hopeless_loss_has_an_infinite_perplexity():
    assert HeldOut(1000.0, 1, 1).perplexity == math.inf


def test_answer_losses_have_the_gradient_of_the_full_loss(model):
    inputs = collate(make_examples(4), 0)
    head = model.get_output_embeddings().weight
    gradients = []
    for loss in (
        answer_losses(model, **inputs).mean(),
        model(**inputs, use_cache=False).loss,
    ):
        gradients.append(torch.autograd.grad(loss, head)[0])

    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-6)


def test_a_frozen_head_sees_a_chunk_at_a_time_and_the_gradient_stays(
    model, monkeypatch
):
    monkeypatch.setattr(answer_loss, "_TOKENS_PER_CHUNK", 3)
    inputs = collate(make_examples(4), 0)
    head = model.get_output_embeddings()
    whole = answer_losses(model, **inputs)
    weights = torch.linspace(-1, 2, len(whole))
    layer = model.base_model.layers[0].mlp.up_proj.weight
    expected = torch.autograd.grad((whole * weights).sum(), layer)[0]
    seen: list[int] = []
    hook = head.register_forward_hook(lambda _, rows, __: seen.append(len(rows[0])))
    head.requires_grad_(False)
    try:
        chunked = answer_losses(model, **inputs)
        got = torch.autograd.grad((chunked * weights).sum(), layer)[0]
    finally:
        hook.remove()
        head.requires_grad_(True)

    assert max(seen) == 3
    assert sum(seen) == len(whole) > 3
    torch.testing.assert_close(chunked, whole)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)


def test_collating_pads_on_the_right():
    rows = [
        {"input_ids": [5, 6], "labels": [-100, 6]},
        {"input_ids": [7], "labels": [7]},
    ]

    got = collate(rows, 9)

    assert got["input_ids"].tolist() == [[5, 6], [7, 9]]
    assert got["attention_mask"].tolist() == [[1, 1], [1, 0]]
    assert got["labels"].tolist() == [[-100, 6], [7, -100]]


class Bigram(torch.nn.Module):
    """A model whose next token depends on the last one by a table of our own."""

    config = PreTrainedConfig()

    def __init__(self, probabilities: list[list[float]]) -> None:
        super().__init__()
        table = torch.tensor(probabilities).log()
        self.head = torch.nn.Linear(len(table), len(table), bias=False)
        self.head.weight.data = table.T.contiguous()

    def base_model(self, input_ids: torch.Tensor, **_: Any) -> Any:
        class Output:
            last_hidden_state = torch.nn.functional.one_hot(
                input_ids, self.head.in_features
            ).float()

        return Output

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


def test_an_answer_streams_in_pieces_and_stops_at_the_limit(model, tokenizer):
    prompt = "What is asthma? A disorder of the"
    inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
    whole = model.generate(
        **{k: v for k, v in inputs.items() if k != "token_type_ids"},
        max_new_tokens=12,
        do_sample=False,
        repetition_penalty=1.1,
        pad_token_id=0,
    )[0, inputs["input_ids"].shape[1] :]

    pieces = list(generate(model, tokenizer, prompt, 12))

    assert "".join(pieces) == tokenizer.decode(whole, skip_special_tokens=True)
    assert len(pieces) > 1
    assert prompt not in "".join(pieces)
    assert pieces == list(generate(model, tokenizer, prompt, 12))


def test_an_answer_that_nobody_waits_for_ends(model, tokenizer, monkeypatch):
    steps = []
    run = model.forward
    monkeypatch.setattr(
        model, "forward", lambda *a, **k: steps.append(1) or run(*a, **k)
    )
    threads = threading.active_count()

    pieces = generate(model, tokenizer, "What is asthma?", 1000)
    next(pieces)
    pieces.close()

    assert threading.active_count() == threads
    assert 0 < len(steps) < 500


def test_answers_in_one_pass_are_those_of_one_at_a_time(model, tokenizer):
    prompts = ["What is asthma?", "Define anaemia. A deficiency of red", "An"]

    together = generate_together(model, tokenizer, prompts, 12)

    alone = ["".join(generate(model, tokenizer, p, 12)).strip() for p in prompts]
    assert together == alone
    assert len(set(alone)) == 3


def test_an_answer_stops_at_the_end_of_text(model, tokenizer, monkeypatch):
    bias = torch.zeros(384)
    bias[tokenizer.eos_token_id] = 1e4
    head = model.get_output_embeddings()
    hook = head.register_forward_hook(lambda module, args, out: out + bias)
    try:
        assert "".join(generate(model, tokenizer, "What is asthma?", 50)) == ""
    finally:
        hook.remove()


def test_a_temperature_samples(model, tokenizer):
    torch.manual_seed(0)
    answers = {"".join(generate(model, tokenizer, "Define", 8, 1.0)) for _ in range(3)}

    assert len(answers) > 1


@pytest.mark.timeout(20)
def test_a_failure_while_generating_reaches_the_caller(model, tokenizer, monkeypatch):
    def fail(*args: Any, **kwargs: Any) -> None:
        raise MemoryError("no room")

    monkeypatch.setattr(model, "generate", fail)

    with pytest.raises(MemoryError, match="no room"):
        list(generate(model, tokenizer, "What", 5))


def test_generating_leaves_no_thread_behind(model, tokenizer):
    before = threading.active_count()

    list(generate(model, tokenizer, "What", 3))

    assert threading.active_count() == before


def test_every_token_that_ends_an_answer_is_known(model, tokenizer, monkeypatch):
    assert generation._ends(model, tokenizer) == [2]
    monkeypatch.setattr(model.generation_config, "eos_token_id", [7, 9])
    assert generation._ends(model, tokenizer) == [2, 7, 9]
    monkeypatch.setattr(model.generation_config, "eos_token_id", None)
    assert generation._ends(model, tokenizer) == [2]
