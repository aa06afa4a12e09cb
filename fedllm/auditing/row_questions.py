"""What a server may ask of a client's rows under record level, and what may not come back.

A server writes the run config. So it can ask a question of each row that no noise covers,
unless code, keys, metrics and shapes of a reply are the same for every row: how many rows a
chat template of its own makes too long, or rejects, how many are shorter than a limit, how
many are usable at all. This check asks a client such questions about files that differ in one
row, and compares the replies. The values of the arrays alone may differ.
"""

import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flwr.app import Context, Message, RecordDict

from fedllm.adapters.peft_model import initial_arrays
from fedllm.adapters.resolve import adapter_spec
from fedllm.auditing.harness import fresh_home
from fedllm.auditing.toy_model import save_toy_model
from fedllm.config import AdapterConfig
from fedllm.models.location import load_config
from fedllm.wire.masking import NONCE
from fedllm.wire.messages import (
    ARRAYS,
    CONFIG,
    NOISE_MULTIPLIER,
    TOTAL_ROWS,
    array_record,
    own_config,
)
from fedllm.wire.task_identity import set_task_identity

Answer = Callable[[Message, Context], Message]
"""A client: a message and its context -> a reply."""

NUM_ROWS = 6
_WORD = "HIV"
_ADAPTER = AdapterConfig(kind="lora-core", rank=2, target_modules="q_proj")
_ORDINARY = (
    b'{"instruction": "Is the patient well?", "response": "yes", "patient": "a"}'
)
ROWS: Mapping[str, bytes] = {
    "ordinary": _ORDINARY,
    "of another person": _ORDINARY.replace(b'"a"', b'"b"'),
    "of no person": _ORDINARY.replace(b'"a"', b'[{"a": null}]'),
    "with the word": b'{"instruction": "Does the patient have HIV?", "response": "yes"}',
    "long question": b'{"instruction": "' + b"a " * 400 + b'", "response": "yes"}',
    "no answer": b'{"instruction": "Is the patient well?", "response": ""}',
    "answer missing": b'{"instruction": "Is the patient well?"}',
    "other columns": b'{"question": "q", "answer": "a"}',
    "no text": b'{"instruction": 1998, "response": ["yes"]}',
    "nested": b'{"messages": [{"role": 1}], "instruction": {"a": {"b": []}}}',
    "several turns": b'{"messages": ['
    + b", ".join(
        [
            b'{"role": "user", "content": "Is the patient well?"}',
            b'{"role": "assistant", "content": "yes"}',
        ]
        * 3
    )
    + b"]}",
    "a text": b'{"text": "' + b"The patient has HIV. " * 40 + b'"}',
    "not a number": b'{"instruction": NaN, "response": Infinity}',
    "half a character": b'{"instruction": "\\ud83d", "response": "\\udcff"}',
    "emoji": '{"instruction": "\U0001f9ec?", "response": "\U0001f44d"}'.encode(),
    "no object": b"[1, 2]",
    "no JSON": b'{"instruction": ',
    "no UTF-8": b'{"instruction": "\xff", "response": "a"}',
}
"""The last row of a file, by what it holds."""

_TURN = (
    "{{ m['role'] }}: {{ m['content'] }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
_IF_WORD = "{% if '" + _WORD + "' in m['content'] %}"
TEMPLATES: Mapping[str, str] = {
    "plain": "{% for m in messages %}" + _TURN,
    "longer at a word": "{% for m in messages %}"
    + _IF_WORD
    + "{% for i in range(300) %}a {% endfor %}{% endif %}"
    + _TURN,
    "fails at a word": "{% for m in messages %}"
    + _IF_WORD
    + "{{ raise_exception('x') }}{% endif %}"
    + _TURN,
}
# Given, since to calibrate would take most of the time.
_NOISE = {"privacy.target-epsilon": 0.0, "privacy.noise-multiplier": 4.0}
# Refused before the training, so never charged: a question that costs nothing.
_QUIET = {"privacy.noise-multiplier": 0.05, "privacy.max-epsilon": 1.0}
_PERSONS = {"data.person-column": "patient"}
QUESTIONS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "which epsilon": ("plain", {}),
    "as many as a batch": ("plain", {"train.batch-size": NUM_ROWS, **_QUIET}),
    "shorter than a limit": (
        "plain",
        {"train.max-length": 64, "train.batch-size": NUM_ROWS, **_QUIET},
    ),
    "a word, by length": (
        "longer at a word",
        {"train.max-length": 256, "train.batch-size": NUM_ROWS, **_QUIET},
    ),
    "a word, by failure": ("fails at a word", {}),
    "an epoch": ("plain", {"train.local-steps": 0, "train.batch-size": 2}),
    "a sum for joint noise": ("plain", {"privacy.noise": "joint"}),
    "a word, by a joint sum": ("fails at a word", {"privacy.noise": "joint"}),
    "how many persons": ("plain", {**_PERSONS, "train.local-steps": 0}),
    "persons, by a joint sum": ("plain", {**_PERSONS, "privacy.noise": "joint"}),
    "as many persons as a batch": (
        "plain",
        {**_PERSONS, "train.batch-size": NUM_ROWS, **_QUIET},
    ),
    "which rows are texts": ("plain", {"data.format": "text", "data.name": "own"}),
    "shorter than a limit, cut": (
        "longer at a word",
        {"train.max-length": 64, "data.long-questions": "cut-left"},
    ),
    "a column of the server's": ("plain", {"data.person-column": "response", **_QUIET}),
}
"""What a server asks: a chat template, and settings of the run."""


@dataclass(frozen=True)
class RowFindings:
    """The replies that one question got.

    Attributes:
        question: Its name.
        by_reply: What came back without noise, and the rows for which it did.
        trains: Whether a client has to train for its reply; else it refuses.
    """

    question: str
    by_reply: Mapping[str, list[str]]
    trains: bool

    @property
    def passed(self) -> bool:
        """Whether the replies are the same for all rows, and what was expected."""
        is_trained = {ARRAYS in reply.split() for reply in self.by_reply}
        return len(self.by_reply) == 1 and is_trained == {self.trains}

    @property
    def text(self) -> str:
        """The finding in words."""
        if len(self.by_reply) == 1:
            (only,) = self.by_reply
            return f"{len(self.by_reply[only])} kinds of row, one reply: {only}"
        return "; ".join(
            f"{reply} for {', '.join(rows)}" for reply, rows in self.by_reply.items()
        )


def ask_about_rows(answer: Answer) -> Iterator[RowFindings]:
    """Ask a client every question about files that differ in their last row.

    Args:
        answer: The client's message handler.

    Yields:
        What came back for each question.
    """
    set_task_identity()
    with tempfile.TemporaryDirectory(prefix="fedllm-audit-") as name:
        folder = Path(name)
        models = {t: folder / f"model-{i}" for i, t in enumerate(TEMPLATES)}
        for template, path in models.items():
            save_toy_model(path, TEMPLATES[template])
        for question, (template, changes) in QUESTIONS.items():
            by_reply: dict[str, list[str]] = {}
            for row, last in ROWS.items():
                reply = reply_about(answer, models[template], last, changes)
                by_reply.setdefault(reply, []).append(row)
            trains = not _QUIET.items() <= changes.items()
            yield RowFindings(question, by_reply, trains)


def reply_about(
    answer: Answer, model: Path, last: bytes, changes: Mapping[str, Any]
) -> str:
    """Return what comes back without noise of a client whose last row is given.

    Args:
        answer: The client's message handler.
        model: Folder of the base model that the run names.
        last: A line of a .jsonl file.
        changes: Settings of the run.
    """
    # Rows are kept from message to message by the file's name: each client has its own.
    path = model.with_name(f"{os.urandom(8).hex()}.jsonl")
    path.write_bytes(b"\n".join([_ORDINARY] * (NUM_ROWS - 1) + [last]))
    with fresh_home():
        return _without_values(_ask(answer, str(model), path, changes))


def _ask(
    answer: Answer, model: str, rows: Path, changes: Mapping[str, Any]
) -> RecordDict:
    """Return what a client that holds some rows replies to a run of some settings."""
    config = {
        **_NOISE,
        "privacy.unit": "record",
        "privacy.delta": 1e-5,
        "model.name": model,
        "model.quantization": 0,
        "adapter.kind": _ADAPTER.kind,
        "adapter.rank": _ADAPTER.rank,
        "adapter.target-modules": _ADAPTER.target_modules,
        "num-server-rounds": 1,
        "train.batch-size": 2,
        "train.local-steps": 1,
        **changes,
    }
    arrays = array_record(
        initial_arrays(adapter_spec(_ADAPTER, load_config(model), 42))
    )
    numbers = {
        NOISE_MULTIPLIER: float(config["privacy.noise-multiplier"]),
        TOTAL_ROWS: 10 * NUM_ROWS,
    }
    record = own_config({"server-round": 1, "learning-rate": 0.1, **numbers})
    message = Message(RecordDict({ARRAYS: arrays, CONFIG: record}), 1, "train")
    node: dict[str, Any] = {"data-path": str(rows), "partition-id": 0}
    if "data.person-column" in changes:
        node |= {
            "privacy-unit": "record",
            "privacy-noise": "joint",
            "model-name": model,
        }
        node |= {"person-column": "patient", "declared-persons": NUM_ROWS}
    context = Context(1, 1, node, RecordDict(), config)
    return answer(message, context).content


def _without_values(content: RecordDict) -> str:
    """Return all of a reply but for its nonce and the values of its arrays, as text."""
    parts = [
        f"{key} {[(name, a.dtype, tuple(a.shape), len(a.data)) for name, a in r.items()]}"
        for key, r in content.array_records.items()
    ]
    others: dict[str, Any] = {**content.metric_records, **content.config_records}
    for key in sorted(others):
        told = {name: value for name, value in others[key].items() if name != NONCE}
        parts.append(f"{key} {told}")
    return ", ".join(parts)
