"""Answers stream, stop, and end with the caller."""

import threading
from typing import Any

import pytest
import torch

from fedllm.evaluation import generation
from fedllm.evaluation.generation import generate, generate_together


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


def test_a_generation_ends_when_its_reader_does(model, tokenizer, monkeypatch):
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
