"""Rendering: a conversation as the text that a model sees, and which of it is learned.

The chat template decides how a turn looks. Where an answer stands follows from rendering
the conversation up to it, and then with it. Whatever a template leaves out, or writes so
that no end of the answer can be learned, makes the row unusable: a model that is trained on
an empty answer gives no sign of it.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fedllm.config import DataConfig
from fedllm.data.conversations import Conversation
from fedllm.data.prompts import ChatTemplate, alpaca, common_prefix_length, ended
from fedllm.data.shapes import PlainText
from fedllm.data.turns import ASSISTANT, SYSTEM, USER, Message, UnusableRowError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_THOUGHT_ENDS = "</think>"


@dataclass(frozen=True)
class Rendered:
    """Text, and what of it is learned.

    Attributes:
        text: All of it.
        spans: Begin and end of each answer, in characters; empty: all is learned.
        adds_special: Whether the tokenizer adds its own tokens to the text.
        mask: Tokens, and 1 for each that the chat template itself marks as an answer.
        is_whole: Whether all answers are learned.
    """

    text: str
    spans: tuple[tuple[int, int], ...]
    adds_special: bool
    mask: tuple[list[int], list[int]] | None = None
    is_whole: bool = True


class Renderer:
    """Renders rows for one tokenizer.

    Args:
        tokenizer: The base model's tokenizer.
        config: Gives `merge_turns`.
    """

    def __init__(
        self, tokenizer: "PreTrainedTokenizerBase", config: DataConfig
    ) -> None:
        self._end = tokenizer.eos_token or ""
        self._merges = config.merge_turns
        self._template = ChatTemplate(tokenizer) if tokenizer.chat_template else None

    def render(self, content: Conversation | PlainText) -> Rendered:
        """Return the text of a row.

        Raises:
            UnusableRowError: The template rejects the row, or leaves a part of it out.
        """
        if isinstance(content, PlainText):
            return Rendered(content.text, (), adds_special=True)
        if self._template is None:
            return self._alpaca(content)
        problem: UnusableRowError | None = None
        for form in self._forms(content):
            try:
                return _rendered(self._template, form)
            except UnusableRowError as error:
                problem = problem or error
        raise problem or UnusableRowError("the chat template cannot be used")

    def _alpaca(self, content: Conversation) -> Rendered:
        if content.tools or any("tool_calls" in turn for turn in content.turns):
            raise UnusableRowError("tools need a model with a chat template")
        text, spans = "", []
        for place in content.learned:
            text = alpaca(content.turns[:place], self._end)
            answer = ended(content.turns[place]["content"], self._end)
            spans.append((len(text), len(text) + len(answer)))
            text += answer
        return Rendered(text, tuple(spans), adds_special=True)

    def _forms(self, content: Conversation) -> list[Conversation]:
        """Return the conversation as it is, then merged if the config allows it."""
        forms = [content]
        if self._merges:
            forms.append(_merged(content))
            forms.append(_merged(_without_system(content)))
        return forms


def _rendered(template: ChatTemplate, content: Conversation) -> Rendered:
    try:
        text = template.render(content.turns, content.tools)
        _require_turns(content, text)
        if content.tools and text == template.render(content.turns):
            raise UnusableRowError("the chat template leaves out the tools")
        spans = tuple(
            _span(template, content, place, text) for place in content.learned
        )
        mask = template.answer_mask(content.turns, content.tools)
    except UnusableRowError:
        raise
    except Exception as error:  # noqa: BLE001 - a template may raise anything
        cause = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise UnusableRowError(f"the chat template rejects it: {cause}") from None
    num_answers = sum(turn["role"] == ASSISTANT for turn in content.turns)
    is_whole = num_answers == len(content.learned)
    return Rendered(text, spans, adds_special=False, mask=mask, is_whole=is_whole)


def _require_turns(content: Conversation, text: str) -> None:
    """Check that what is not an answer stands in the text: it is what the answer is about."""
    for place, turn in enumerate(content.turns):
        if turn["role"] == ASSISTANT:
            continue
        if not _stands(turn["content"], text):
            hint = " (data.merge-turns)" if turn["role"] == SYSTEM else ""
            kind = f"a turn of {turn['role']!r}" if place else "the first turn"
            raise UnusableRowError(f"the chat template leaves out {kind}{hint}")


def _stands(content: str, text: str) -> bool:
    """Return whether a turn's content is in a text, as it is or escaped as in JSON."""
    core = _core(content)
    return core in text or _escaped(core) in text


def _core(content: str) -> str:
    """Return what a template keeps of a content: templates drop thoughts and outer blanks."""
    return content.rpartition(_THOUGHT_ENDS)[2].strip()


def _escaped(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)[1:-1]


def _span(
    template: ChatTemplate, content: Conversation, place: int, text: str
) -> tuple[int, int]:
    """Return where an answer begins and ends in the text of its conversation.

    Raises:
        UnusableRowError: The template leaves it out, or writes the turns before it, or the
            answer, otherwise once the conversation goes on.
    """
    turns, tools = content.turns, content.tools
    before = template.render(turns[:place], tools, opens_answer=True)
    start = _num_shared(before, text)
    if not all(_stands(t["content"], text[:start]) for t in turns[:place]):
        raise UnusableRowError(
            "the chat template writes the beginning of a conversation otherwise once it "
            "goes on (data.merge-turns helps where it moves the system turn)"
        )
    if place == len(turns) - 1:
        end = len(text)
    else:
        end = _end(template, content, place, text, start)
    _require_answer(turns[place], text[start:end])
    return start, end


def _end(
    template: ChatTemplate,
    content: Conversation,
    place: int,
    text: str,
    start: int,
) -> int:
    """Return where an answer ends that is not the last.

    Args:
        template: The chat template.
        content: The conversation.
        place: That of the answer's turn.
        text: All of the conversation.
        start: Where the answer begins.
    """
    turns, tools = content.turns, content.tools
    up_to = template.render(turns[: place + 1], tools)
    if text.startswith(up_to):
        return len(up_to)
    core = _core(turns[place]["content"])
    # Some templates end the last answer in another way, but not if one more is asked for.
    asked = template.render(turns[: place + 1], tools, opens_answer=True)
    end = max(_num_shared(up_to, text), _num_shared(asked, text))
    found = text.find(core, start)
    if found >= 0 and found + len(core) <= end:
        mark = template.marks.search(text, found + len(core), end)
        return mark.end() if mark else end
    # Others write more into the last answer than into earlier ones, as thoughts.
    after = up_to[up_to.rfind(core) + len(core) :]
    if core and found >= 0 and text.startswith(after, found + len(core)):
        return found + len(core) + len(after)
    return end


def _num_shared(beginning: str, text: str) -> int:
    """Return how many leading characters two texts share; mostly one begins the other."""
    if text.startswith(beginning):
        return len(beginning)
    return common_prefix_length(beginning, text)


def _require_answer(turn: Message, text: str) -> None:
    """Check that an answer stands in the text that is learned as such."""
    names = [call["function"]["name"] for call in turn.get("tool_calls", ())]
    if not _stands(turn["content"], text) or not all(name in text for name in names):
        raise UnusableRowError("the chat template leaves out the answer")


def _without_system(content: Conversation) -> Conversation:
    """Return a conversation whose system turns stand before the first question's text."""
    system = [t["content"] for t in content.turns if t["role"] == SYSTEM]
    first = next(i for i, t in enumerate(content.turns) if t["role"] == USER)
    turns: list[Message] = []
    learned = []
    for place, turn in enumerate(content.turns):
        if turn["role"] == SYSTEM:
            continue
        if place == first:
            turn = turn | {"content": "\n\n".join([*system, turn["content"]])}
        if place in content.learned:
            learned.append(len(turns))
        turns.append(turn)
    return Conversation(content.columns, turns, tuple(learned), content.tools)


def _merged(content: Conversation) -> Conversation:
    """Return a conversation in which no two turns of text in a row have one role."""
    turns: list[Message] = []
    learned: list[bool] = []
    for place, turn in enumerate(content.turns):
        is_learned = place in content.learned
        last = turns[-1] if turns else None
        if last is not None and _may_merge(last, turn) and learned[-1] == is_learned:
            both: Sequence[Any] = (last["content"], turn["content"])
            turns[-1] = last | {"content": "\n\n".join(both)}
        else:
            turns.append(turn)
            learned.append(is_learned)
    places = tuple(place for place, is_learned in enumerate(learned) if is_learned)
    return Conversation(content.columns, turns, places, content.tools)


def _may_merge(one: Message, other: Message) -> bool:
    is_text = one.keys() == other.keys() == {"role", "content"}
    return is_text and one["role"] == other["role"]
