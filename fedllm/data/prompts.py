"""Prompts: a row as a conversation, and a conversation as text and tokens.

With a chat template the tokens are those of TRL 1.16's SFTTrainer for conversational
prompt and completion columns; without one the text is Alpaca's, as TRL would take it
from plain prompt and completion columns.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from fedllm.config import DataConfig
from fedllm.data.readers import Row
from fedllm.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MESSAGES = "messages"
PREAMBLE = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request."
)

Message = dict[str, str]


def to_prompt_completion(
    config: DataConfig, row: Row
) -> tuple[list[Message], list[Message]] | None:
    """Return the conversation before the answer, and the answer, as chat messages.

    These are TRL's conversational prompt and completion. In a `messages` column the
    last turn of the assistant is the answer, and later turns are ignored.

    Returns:
        (prompt, completion), or None if the question or the answer is missing or blank.

    Raises:
        DataError: A question or answer that is not text, or messages without role and
            content.
    """
    if row.get(MESSAGES) is not None:
        turns = _read_messages(row[MESSAGES])
    else:
        question = _read_text(row.get(config.prompt_column), config.prompt_column)
        answer = _read_text(row.get(config.response_column), config.response_column)
        turns = [_message("user", question), _message("assistant", answer)]
    last = max((i for i, t in enumerate(turns) if t["role"] == "assistant"), default=0)
    prompt, completion = turns[:last], turns[last : last + 1]
    has_question = any(
        turn["content"].strip() for turn in prompt if turn["role"] == "user"
    )
    if not has_question or not completion[0]["content"].strip():
        return None
    return prompt, completion


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
        prompt += [_message("user", earlier), _message("assistant", answer)]
    prompt.append(_message("user", question))
    if tokenizer.chat_template:
        return str(
            tokenizer.apply_chat_template(
                prompt, tokenize=False, add_generation_prompt=True
            )
        )
    text = _alpaca(prompt)
    ids = tokenizer(text=text)["input_ids"]
    # A sentencepiece tokenizer puts a space before the first word of a text, but not
    # before a word that follows a special token.
    bos = tokenizer.bos_token or ""
    for candidate in (text, f"{bos}{text}", f"{bos} {text}"):
        if tokenizer(text=candidate, add_special_tokens=False)["input_ids"] == ids:
            return candidate
    return f"{bos}{text}"


def training_texts(
    tokenizer: "PreTrainedTokenizerBase",
    prompt: list[Message],
    completion: list[Message],
) -> tuple[str, str]:
    """Return the prompt alone, and the whole conversation, for `encode`.

    Raises:
        DataError: The chat template rejects the conversation.
    """
    if not tokenizer.chat_template:
        text = _alpaca(prompt)
        answer = completion[0]["content"]
        end = tokenizer.eos_token or ""
        if not answer.endswith(end):
            answer += end
        return text, text + answer

    def render(messages: list[Message], **options: bool) -> str:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, **options))

    from jinja2.exceptions import TemplateError

    try:
        return render(prompt, add_generation_prompt=True), render(prompt + completion)
    except TemplateError as error:
        raise DataError(
            f"the model's chat template rejects the conversation: {error}"
        ) from None


def encode(
    tokenizer: "PreTrainedTokenizerBase", texts: Sequence[str]
) -> list[list[int]]:
    """Return the tokens of texts that `training_texts` made.

    All at once takes a fraction of the time that one text after the other takes.
    """
    if not texts:
        return []
    encoded = tokenizer(
        text=list(texts),
        # A chat template writes them itself.
        add_special_tokens=not tokenizer.chat_template,
        # No warning: what is longer than the model allows is cut and counted here.
        verbose=False,
    )
    return [list(ids) for ids in encoded["input_ids"]]


def _alpaca(prompt: list[Message]) -> str:
    """Return a conversation as one text, up to where the answer begins."""
    system = [turn["content"] for turn in prompt if turn["role"] == "system"]
    parts = ["\n".join(system) or PREAMBLE]
    for turn in prompt:
        if turn["role"] != "system":
            name = "Response" if turn["role"] == "assistant" else "Instruction"
            parts.append(f"### {name}:\n{turn['content']}")
    return "\n\n".join([*parts, "### Response:\n"])


def common_prefix_length(ids: list[int], other_ids: list[int]) -> int:
    """Return how many leading tokens two sequences share."""
    length = 0
    for one, other in zip(ids, other_ids, strict=False):
        if one != other:
            break
        length += 1
    return length


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _read_text(value: object, column: str) -> str:
    """Return a cell as text, a missing one as the empty text."""
    if value is None:
        return ""
    if not isinstance(value, str):
        raise DataError(f"column {column!r}: must be text (got {value!r:.80})")
    return value


def _read_messages(value: object) -> list[Message]:
    """Return the turns of a `messages` cell; none if it is missing."""
    turns = []
    for turn in value if isinstance(value, list) else [value] if value else []:
        if not isinstance(turn, dict) or not isinstance(turn.get("role"), str):
            raise DataError(
                "column 'messages': each turn must be an object with role and content "
                f"(got {turn!r:.80})"
            )
        turns.append(_message(turn["role"], _read_text(turn.get("content"), MESSAGES)))
    return turns
