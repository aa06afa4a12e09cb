"""How a chat is worded, in training and when a model is asked."""

from pathlib import Path

import pytest

from fedllm.config import DataConfig
from fedllm.data.prompts import chat_prompt
from fedllm.data.tokens import tokenize
from tests.helpers.rows import ROWS, load_tokenizer, turn


@pytest.mark.parametrize("kind", ["tiny_llama", "tiny_chat_llama"])
def test_a_question_is_asked_in_the_tokens_that_training_showed(
    request: pytest.FixtureRequest, kind: str
) -> None:
    from datasets import Dataset

    tokenizer = load_tokenizer(request.getfixturevalue(kind))
    tokenized = tokenize(Dataset.from_list(ROWS[:1]), tokenizer, DataConfig(), 512)
    row = tokenized.examples[0]
    shown = row["input_ids"][: row["labels"].count(-100)]
    text = chat_prompt(tokenizer, ROWS[0]["instruction"])
    assert tokenizer(text, add_special_tokens=False)["input_ids"] == shown


def test_earlier_turns_are_in_the_prompt_also_without_a_template(
    tiny_llama: Path,
) -> None:
    from datasets import Dataset

    turns = [
        turn("system", "Be brief."),
        turn("user", "What is asthma?"),
        turn("assistant", "A disorder."),
        turn("user", "Of what?"),
        turn("assistant", "Of the lungs."),
    ]
    tokenizer = load_tokenizer(tiny_llama)
    rows = Dataset.from_list([{"messages": turns}])
    ids = tokenize(rows, tokenizer, DataConfig(), 512).examples[0]["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True).strip() == (
        "Be brief.\n\n### Instruction:\nWhat is asthma?\n\n### Response:\nA disorder."
        "\n\n### Instruction:\nOf what?\n\n### Response:\nOf the lungs."
    )
