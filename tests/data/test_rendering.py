"""What a chat template makes of a conversation, and which of it is learned."""

from pathlib import Path
from typing import Any

import pytest

from fedllm.config import DataConfig
from fedllm.data.tokens import Tokenized, tokenize
from tests.helpers.rows import load_tokenizer, turn

QA = {"instruction": "What is a femur?", "response": "The bone of the thigh."}
CHATML = (
    "{% for m in messages %}<|{{ m.role }}|>\n"
    "{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% endif %}"
    "{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
MARKED = (
    "{% for m in messages %}<|{{ m.role }}|>\n{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}</s>{% endgeneration %}"
    "{% else %}{{ m.content }}</s>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
MARKS_QUESTIONS = MARKED.replace("m.role == 'assistant'", "m.role == 'user'")
MARKS_ALL = MARKED.replace("m.role == 'assistant'", "true")
PARTS_ONLY = (
    "{% for m in messages %}<|{{ m.role }}|>\n{% for p in m.content %}{{ p.text }}"
    "{% endfor %}</s>\n{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
# As that of Qwen 3: thoughts stand in the last answer alone.
THINKING = (
    "{% for m in messages %}<|{{ m.role }}|>\n"
    "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m.content.split('</think>')[-1].strip() }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
# As that of Gemma: no system turn, and turns alternate.
STRICT = (
    "{% for m in messages %}{% if m.role == 'system' %}"
    "{{ raise_exception('no system role') }}{% endif %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "<|{{ m.role }}|>\n{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
WITHOUT_SYSTEM = CHATML.replace(
    "<|{{ m.role }}|>",
    "{% if m.role == 'system' %}{% continue %}{% endif %}<|{{ m.role }}|>",
)
TWO_QUESTIONS = {
    "messages": [
        turn("user", "What is asthma?"),
        turn("assistant", "A disorder."),
        turn("user", "Of what?"),
        turn("assistant", "Of the lungs."),
    ]
}


@pytest.fixture
def made(tiny_chat_llama: Path) -> Any:
    def made(template: str | None, row: dict[str, Any], **settings: Any) -> Any:
        tokenizer = load_tokenizer(tiny_chat_llama)
        tokenizer.chat_template = template
        length = settings.pop("length", 512)
        found = tokenize([row], tokenizer, DataConfig(**settings), length)
        return found, tokenizer

    return made


def learned(made: tuple[Tokenized, Any]) -> str:
    found, tokenizer = made
    assert found.unusable == {}
    (example,) = found.examples
    for token, label in zip(example["input_ids"], example["labels"], strict=True):
        assert label in (-100, token)
    return str(tokenizer.decode([t for t in example["labels"] if t >= 0]))


def text(made: tuple[Tokenized, Any]) -> str:
    return str(made[1].decode(made[0].examples[0]["input_ids"]))


def why(made: tuple[Tokenized, Any]) -> str:
    assert made[0].examples == []
    (reason,) = made[0].unusable
    return reason


@pytest.mark.parametrize(
    ("template", "both"),
    [
        (CHATML, "A disorder.</s>\nOf the lungs.</s>\n"),
        (MARKED, "A disorder.</s>Of the lungs.</s>"),
        (PARTS_ONLY, "A disorder.</s>\nOf the lungs.</s>\n"),
        (THINKING, "A disorder.</s>\n<think>\n\n</think>\n\nOf the lungs.</s>\n"),
        (STRICT, "A disorder.</s>\nOf the lungs.</s>\n"),
    ],
)
def test_every_answer_is_learned_with_its_end_and_nothing_else(made, template, both):
    assert learned(made(template, TWO_QUESTIONS)) == both


# As that of GPT-OSS: the last answer ends in another token.
TWO_ENDS = (
    "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}"
    "{{ '</s>' if loop.last and not add_generation_prompt else '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
# As that of Phi-3: the whole text has an end of its own.
END_OF_ALL = (
    CHATML.replace("</s>", "<|end|>")
    + "{% if not add_generation_prompt %}</s>{% endif %}"
)


@pytest.mark.parametrize(
    ("template", "both"),
    [
        (TWO_ENDS, "A disorder.<|end|>Of the lungs.</s>"),
        (END_OF_ALL, "A disorder.<|end|>Of the lungs.<|end|>\n</s>"),
    ],
)
def test_an_answer_ends_as_it_does_where_the_conversation_goes_on(made, template, both):
    _, tokenizer = made(CHATML, TWO_QUESTIONS)
    tokenizer.add_special_tokens(
        {"additional_special_tokens": ["<|end|>", "<|start|>"]}
    )
    tokenizer.chat_template = template
    found = tokenize([TWO_QUESTIONS], tokenizer, DataConfig(), 512)
    assert learned((found, tokenizer)) == both


def test_without_a_template_every_answer_ends_in_the_end_of_text(made):
    found = made(None, TWO_QUESTIONS)
    assert learned(found).replace(" ", "") == "Adisorder.</s>Ofthelungs.</s>"


@pytest.mark.parametrize("template", [MARKS_QUESTIONS, MARKS_ALL])
def test_a_template_whose_own_mask_is_another_makes_the_row_unusable(made, template):
    assert "own mask marks other text" in why(made(template, TWO_QUESTIONS))


def test_a_template_that_writes_the_beginning_of_text_gets_no_second_one(made):
    found = made("{{ bos_token }}" + CHATML, QA)
    bos = found[1].bos_token_id
    assert found[1].add_bos_token
    assert found[0].examples[0]["input_ids"].count(bos) == 1


SYSTEM = {"system": "Be brief.", **QA}


@pytest.mark.parametrize("template", [STRICT, WITHOUT_SYSTEM])
def test_a_system_turn_that_the_template_refuses_is_merged_by_option(made, template):
    reason = why(made(template, SYSTEM))
    assert "no system role" in reason or "leaves out the first turn" in reason

    merged = made(template, SYSTEM, merge_turns=True)

    assert "<|user|>\nBe brief.\n\nWhat is a femur?</s>" in text(merged)
    assert learned(merged) == "The bone of the thigh.</s>\n"


def test_turns_of_one_role_in_a_row_are_merged_by_option(made):
    row = {"messages": [*TWO_QUESTIONS["messages"][:2], turn("assistant", "Ask on.")]}
    assert "roles must alternate" in why(made(STRICT, row))
    merged = made(STRICT, row, merge_turns=True)
    assert learned(merged) == "A disorder.\n\nAsk on.</s>\n"
    # Where the template takes them, they stay two.
    both = made(CHATML, row, merge_turns=True)
    assert learned(both) == "A disorder.</s>\nAsk on.</s>\n"


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (CHATML.replace("{{ m.content }}", ""), "leaves out the first turn"),
        (
            CHATML.replace("{{ m.content }}", "{{ m.content if m.role == 'user' }}"),
            "leaves out the answer",
        ),
        (CHATML.replace("</s>", ""), "no end of the answer can be learned"),
        ("{{ messages[9].content.x }}", "rejects it: UndefinedError"),
        ("{{ 1 // 0 }}", "rejects it: ZeroDivisionError"),
    ],
)
def test_a_template_that_swallows_a_part_makes_the_row_unusable(made, template, reason):
    assert reason in why(made(template, QA))


CALL = {"type": "function", "function": {"name": "weather", "arguments": {"c": "Bonn"}}}
ASKS = {"role": "assistant", "content": None, "tool_calls": [CALL]}


def test_a_tool_call_is_learned_where_the_template_writes_it(made):
    row = {"messages": [turn("user", "Rain?"), ASKS]}
    assert '"name": "weather"' in learned(made(CHATML, row))
    bare = CHATML.replace("{{ m.tool_calls | tojson }}", "")
    assert "leaves out the answer" in why(made(bare, row))
    assert "leaves out the tools" in why(made(CHATML, row | {"tools": [CALL]}))
    with_tools = "{{ tools | tojson if tools }}" + CHATML
    assert "weather" in learned(made(with_tools, row | {"tools": [CALL]}))
    assert "tools need a model with a chat template" in why(made(None, row))


def test_a_long_question_is_cut_from_the_left_by_option(made):
    row = {"instruction": "long " * 100, "response": "Yes."}
    assert "no answer within" in why(made(CHATML, row, length=40))
    found = made("{{ bos_token }}" + CHATML, row, length=40, long_questions="cut-left")
    ids = found[0].examples[0]["input_ids"]
    assert len(ids) == 40 and ids[0] == found[1].bos_token_id
    assert learned(found) == "Yes.</s>\n"
    assert found[0].cut_left == [0] and found[0].truncated == []


def test_plain_text_is_learned_whole_and_packed_only_where_asked(made):
    found, tokenizer = made(CHATML, {"text": "An allergy."})
    (example,) = found.examples
    ids = example["input_ids"]
    assert ids[0] == tokenizer.bos_token_id and ids[-1] == tokenizer.eos_token_id
    assert example["labels"] == [-100, *ids[1:]]

    rows = [{"text": "An allergy."}, QA, {"text": "A vaccine. " * 90}]
    alone = tokenize(rows, tokenizer, DataConfig(), 80)
    assert len(alone.examples) == 3
    assert alone.examples[0] == example and len(alone.examples[2]["input_ids"]) == 80
    assert alone.truncated == [2]

    whole = tokenize(rows, tokenizer, DataConfig(), 80, whole_texts=True)
    chat, *pieces = whole.packed(80)
    assert chat == alone.records[1]
    assert {len(piece["input_ids"]) for piece in pieces[:-1]} == {80}
    joined = [token for piece in pieces for token in piece["input_ids"]]
    assert joined[: len(ids)] == ids and joined.count(tokenizer.eos_token_id) == 2


def test_a_token_beyond_the_embedding_makes_the_row_unusable(made):
    _, tokenizer = made(CHATML, QA)
    tokenizer.add_tokens(["femur"])
    rows = [QA, {**QA, "instruction": "What is a tic?"}]
    found = tokenize(rows, tokenizer, DataConfig(), 512, vocabulary=384)
    assert [record is None for record in found.records] == [True, False]
    assert "beyond the model's embedding" in next(iter(found.unusable))
