"""Prompts: how a chat is worded for a model, in training and when it is asked.

With a chat template the tokens are those of TRL 1.16's SFTTrainer for conversational
prompt and completion columns; without one the text is Alpaca's, as TRL would take it
from plain prompt and completion columns.
"""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fedllm.data.turns import ASSISTANT, SYSTEM, USER, Message, turn_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PREAMBLE = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request."
)

_MARKS_ANSWERS = re.compile(r"\{%-?\s*generation\b")
_MARK = re.compile(r"[<\[|].*[>\]|]", re.DOTALL)
_PROBE = "fedllm looks for this text"


def chat_prompt(
    tokenizer: "PreTrainedTokenizerBase",
    question: str,
    history: Sequence[tuple[str, str]] = (),
) -> str:
    """Return the text of a question as the training rows ask it.

    It holds every special token: encode it with `add_special_tokens=False`.

    Args:
        tokenizer: The base model's tokenizer.
        question: The question.
        history: Earlier (question, answer) pairs, the oldest first.
    """
    prompt = []
    for earlier, answer in history:
        prompt += [turn_of(USER, earlier), turn_of(ASSISTANT, answer)]
    prompt.append(turn_of(USER, question))
    if tokenizer.chat_template:
        return ChatTemplate(tokenizer).render(prompt, opens_answer=True)
    text = alpaca(prompt, tokenizer.eos_token or "")
    ids = tokenizer(text=text)["input_ids"]
    # A sentencepiece tokenizer puts a space before the first word of a text, but not
    # before a word that follows a special token.
    bos = tokenizer.bos_token or ""
    for candidate in (text, f"{bos}{text}", f"{bos} {text}"):
        if tokenizer(text=candidate, add_special_tokens=False)["input_ids"] == ids:
            return candidate
    return f"{bos}{text}"


class ChatTemplate:
    """A tokenizer's chat template, given contents in the form that it reads.

    Some templates read a content only as a list of parts, and write an empty turn where
    they get text.

    Args:
        tokenizer: Has a chat template.

    Attributes:
        marks: Finds the tokens that may end an answer, in text.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        self._tokenizer = tokenizer
        self.marks = re.compile("|".join(map(re.escape, end_marks(tokenizer).values())))
        self._in_parts = False
        if not self._writes_probe():
            self._in_parts = True
            self._in_parts = self._writes_probe()

    def render(
        self,
        turns: Sequence[Message],
        tools: list[Any] | None = None,
        opens_answer: bool = False,
    ) -> str:
        """Return a conversation as text; the template may raise anything.

        Args:
            turns: The conversation.
            tools: What the assistant may call.
            opens_answer: Whether the text ends where an answer begins.
        """
        if self._in_parts:
            turns = [turn | {"content": _as_parts(turn["content"])} for turn in turns]
        return str(
            self._tokenizer.apply_chat_template(
                list(turns),
                tools=tools,
                tokenize=False,
                add_generation_prompt=opens_answer,
            )
        )

    def answer_mask(
        self, turns: Sequence[Message], tools: list[Any] | None
    ) -> tuple[list[int], list[int]] | None:
        """Return tokens, and 1 for each that the template itself marks as an answer.

        None if it marks none: few templates do.
        """
        if not _MARKS_ANSWERS.search(str(self._tokenizer.chat_template)):
            return None
        if self._in_parts:
            turns = [turn | {"content": _as_parts(turn["content"])} for turn in turns]
        encoded = self._tokenizer.apply_chat_template(
            list(turns),
            tools=tools,
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        mask = list(encoded["assistant_masks"])
        return (list(encoded["input_ids"]), mask) if any(mask) else None

    def _writes_probe(self) -> bool:
        try:
            return _PROBE in self.render([turn_of(USER, _PROBE)])
        except Exception:  # noqa: BLE001 - a template may raise anything
            return False


def _as_parts(content: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": content}]


def encode(
    tokenizer: "PreTrainedTokenizerBase", texts: Sequence[str], adds_special: bool
) -> list[list[int]]:
    """Return the tokens of texts.

    All at once takes a fraction of the time that one text after the other takes.

    Args:
        tokenizer: The base model's tokenizer.
        texts: Any number.
        adds_special: Whether the tokenizer adds its own, such as the beginning of text. A
            chat template writes them itself.
    """
    if not texts:
        return []
    encoded = tokenizer(
        text=list(texts),
        add_special_tokens=adds_special,
        # No warning: what is longer than the model allows is cut and counted here.
        verbose=False,
    )
    found = [list(ids) for ids in encoded["input_ids"]]
    if adds_special or tokenizer.bos_token is None:
        return found
    twice = tokenizer.bos_token * 2
    return [
        # Some tokenizers add it whatever they are asked.
        (
            ids[1:]
            if ids[:2] == [tokenizer.bos_token_id] * 2 and twice not in text
            else ids
        )
        for ids, text in zip(found, texts, strict=True)
    ]


def end_marks(tokenizer: Any) -> dict[int, str]:
    """Return the tokens that may end an answer, with their text: end of text, and of a turn.

    Added tokens that are text, as runs of blanks in some tokenizers, end nothing.
    """
    marks = {
        int(token): str(added.content)
        for token, added in tokenizer.added_tokens_decoder.items()
        if added.special or _MARK.fullmatch(added.content)
    }
    for token in (tokenizer.unk_token_id, tokenizer.bos_token_id):
        marks.pop(token, None)
    if tokenizer.eos_token_id is not None:
        marks[int(tokenizer.eos_token_id)] = str(tokenizer.eos_token)
    return marks


def alpaca(prompt: Sequence[Message], end: str) -> str:
    """Return a conversation as one text, up to where the answer begins.

    Args:
        prompt: Turns of system, user and assistant.
        end: Stands after each earlier answer, as after the last.
    """
    system = [turn["content"] for turn in prompt if turn["role"] == SYSTEM]
    parts = ["\n".join(system) or PREAMBLE]
    for turn in prompt:
        if turn["role"] == ASSISTANT:
            parts.append(f"### Response:\n{ended(turn['content'], end)}")
        elif turn["role"] != SYSTEM:
            parts.append(f"### Instruction:\n{turn['content']}")
    return "\n\n".join([*parts, "### Response:\n"])


def ended(answer: str, end: str) -> str:
    """Return an answer with one end of text after it."""
    return answer if answer.endswith(end) else answer + end


def common_prefix_length(ids: Sequence[Any], other_ids: Sequence[Any]) -> int:
    """Return how many leading tokens, or characters, two sequences share."""
    length = 0
    for one, other in zip(ids, other_ids, strict=False):
        if one != other:
            break
        length += 1
    return length
