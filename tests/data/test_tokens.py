"""The tokens of rows are those of TRL's trainer."""

import logging
from pathlib import Path
from typing import Any

import pytest

from fedllm.config import DataConfig
from fedllm.data.rows import load_rows
from fedllm.data.tokens import tokenize
from tests.helpers.rows import ROWS, load_tokenizer, turn


def test_rows_without_an_answer_are_counted_and_left_out(tiny_llama: Path) -> None:
    from datasets import Dataset

    rows = Dataset.from_list([*ROWS, {"instruction": "q", "response": "", "n": 4}])
    tokenized = tokenize(rows, load_tokenizer(tiny_llama), DataConfig(), 512)
    assert len(tokenized.examples) == 3
    assert tokenized.unusable == {"no answer": [3]}
    assert tokenized.truncated == []


def test_a_client_without_a_usable_row_has_no_examples(tiny_llama: Path) -> None:
    from datasets import Dataset

    rows = Dataset.from_list([{"instruction": "q", "response": ""}])
    tokenizer = load_tokenizer(tiny_llama)
    tokenized = tokenize(rows, tokenizer, DataConfig(), 512)
    assert tokenized.examples == []
    empty = tokenize(rows.select([]), tokenizer, DataConfig(), 512)
    assert empty.examples == []


def test_many_rows_become_the_tokens_of_each_alone_and_nothing_is_logged(
    tiny_chat_llama: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from datasets import Dataset

    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    # More than are read at once; the last is longer than the model takes.
    questions = [f"what is {number}?" for number in range(2002)] + ["why? " * 400]
    rows = [{"instruction": q, "response": "because"} for q in questions]
    tokenizer = load_tokenizer(tiny_chat_llama)
    tokenizer.model_max_length = 256

    together = tokenize(Dataset.from_list(rows), tokenizer, DataConfig(), 4096).examples

    assert len(together) == len(rows)
    for number in (0, 999, 1000, 2001, 2002):
        alone = Dataset.from_list(rows[number : number + 1])
        (expected,) = tokenize(alone, tokenizer, DataConfig(), 4096).examples
        assert together[number] == expected
    assert len(together[2002]["input_ids"]) > 256
    assert caplog.messages == []


def test_a_row_after_the_first_thousand_is_named_by_its_place(
    tiny_chat_llama: Path,
) -> None:
    from datasets import Dataset

    rows = [{"messages": [turn("user", "q"), turn("assistant", "a")]}] * 1200
    rows.append({"messages": [{"role": "user", "content": None}, {"role": None}]})
    data = Dataset.from_list(rows)

    found = tokenize(data, load_tokenizer(tiny_chat_llama), DataConfig(), 512)

    reason = "column 'messages': a turn without role and content, or from and value"
    assert found.unusable == {reason: [1200]}


def test_a_template_that_refuses_a_conversation_is_the_reason(
    tiny_chat_llama: Path,
) -> None:
    tokenizer = load_tokenizer(tiny_chat_llama)
    tokenizer.chat_template = "{{ raise_exception('no system role') }}"
    found = tokenize(ROWS, tokenizer, DataConfig(), 512)
    (reason,) = found.unusable
    assert "template rejects it: TemplateError: no system role" in reason
    assert found.records == [None] * 3


# Tokens

ALPACA = (
    "Below is an instruction that describes a task. Write a response that "
    "appropriately completes the request.\n\n### Instruction:\n{}\n\n### Response:\n"
)


def trl_examples(folder: Path, rows: Any, max_length: int, output: Path) -> list[Any]:
    """What SFTTrainer makes of prompt and completion columns: ids and labels."""
    from transformers import AutoModelForCausalLM
    from trl import SFTConfig, SFTTrainer

    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(folder),
        args=SFTConfig(
            output_dir=str(output),
            max_length=max_length,
            report_to="none",
            use_cpu=True,
            bf16=False,
        ),
        train_dataset=rows,
        processing_class=load_tokenizer(folder),
    )
    return [(row["input_ids"], row["labels"]) for row in trainer.train_dataset]


def our_examples(tokenized: Any) -> list[Any]:
    return [(row["input_ids"], row["labels"]) for row in tokenized.examples]


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
@pytest.mark.parametrize(
    ("kind", "max_length"),
    [
        ("tiny_llama", 512),
        ("tiny_llama", 180),
        ("tiny_chat_llama", 512),
        ("tiny_chat_llama", 60),
    ],
)
def test_the_tokens_are_those_of_sft_trainer(
    request: pytest.FixtureRequest, tmp_path: Path, kind: str, max_length: int
) -> None:
    from datasets import Dataset

    folder = request.getfixturevalue(kind)
    rows = load_rows(DataConfig()).select(range(0, 4800, 240)).to_list()
    rows += [ROWS[1], {"instruction": "why? " * 200, "response": "because"}]
    columns = []
    for row in rows:
        prompt: Any = ALPACA.format(row["instruction"])
        completion: Any = row["response"]
        if kind == "tiny_chat_llama":
            prompt = [turn("user", row["instruction"])]
            completion = [turn("assistant", row["response"])]
        columns.append({"prompt": prompt, "completion": completion})
    theirs = trl_examples(folder, Dataset.from_list(columns), max_length, tmp_path)
    plain = [{k: row[k] for k in ("instruction", "response")} for row in rows]
    tokenized = tokenize(
        Dataset.from_list(plain), load_tokenizer(folder), DataConfig(), max_length
    )
    assert our_examples(tokenized) == theirs
    assert len(tokenized.records) == len(rows)
    assert len(tokenized.examples) < len(rows)
    assert len(tokenized.examples) >= 10
    assert (len(tokenized.truncated) > 0) == (max_length < 512)


@pytest.mark.parametrize("kind", ["tiny_llama", "tiny_chat_llama"])
def test_only_the_answer_and_its_end_are_scored(
    request: pytest.FixtureRequest, kind: str
) -> None:
    from datasets import Dataset

    tokenizer = load_tokenizer(request.getfixturevalue(kind))
    tokenized = tokenize(Dataset.from_list(ROWS[:1]), tokenizer, DataConfig(), 512)
    scored = [label for label in tokenized.examples[0]["labels"] if label != -100]
    assert tokenizer.eos_token_id in scored
    text = tokenizer.decode(scored, skip_special_tokens=True)
    assert text.strip() == ROWS[0]["response"]
