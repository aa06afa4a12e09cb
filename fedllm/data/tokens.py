"""Rows to token ids, with labels on the answers alone."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fedllm.config import DataConfig
from fedllm.data.columns import Row
from fedllm.data.conversations import Conversation
from fedllm.data.preferences import Preference
from fedllm.data.prompts import common_prefix_length, encode, end_marks
from fedllm.data.rendering import Rendered, Renderer
from fedllm.data.shapes import Content, PlainText, read_row
from fedllm.data.turns import UnusableRowError

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase


Example = dict[str, list[int]]
"""One row for the model: `input_ids` and `labels`; of a preference `chosen_ids`,
`chosen_labels`, `rejected_ids` and `rejected_labels`."""

CUT_AWAY = "no answer within train.max-length"
_UNREADABLE = "cannot be read"
_SAME = "chosen and rejected are the same within train.max-length"
_OTHER_MASK = "the chat template's own mask marks other text than the answers"
# A chat template may write a line's end after the token that ends an answer.
_LAST_TOKENS = 4


_Labelled = tuple[list[int], list[int]]
"""Tokens, and a label for each."""


def pair_of(
    chosen: Mapping[str, list[int]], rejected: Mapping[str, list[int]]
) -> Example:
    """Return the example of a preference; `texts_of` gives its two texts back.

    Args:
        chosen: A text with `input_ids` and `labels`.
        rejected: Another.
    """
    return {
        "chosen_ids": chosen["input_ids"],
        "chosen_labels": chosen["labels"],
        "rejected_ids": rejected["input_ids"],
        "rejected_labels": rejected["labels"],
    }


def texts_of(example: Mapping[str, Any]) -> tuple[Mapping[str, Any], ...]:
    """Return an example's texts, each with `input_ids` and `labels`: of a preference two.

    Args:
        example: One of `Tokenized`.
    """
    if "chosen_ids" not in example:
        return (example,)
    return tuple(
        {"input_ids": example[f"{side}_ids"], "labels": example[f"{side}_labels"]}
        for side in ("chosen", "rejected")
    )


@dataclass(frozen=True)
class Limits:
    """What an example may be.

    Attributes:
        max_length: Longest example in tokens.
        vocabulary: Rows of the model's embedding; None: not known.
        whole_texts: Whether plain text may be longer.
    """

    max_length: int
    vocabulary: int | None = None
    whole_texts: bool = False


@dataclass(frozen=True)
class Tokenized:
    """Rows as labelled tokens, and what was cut or left out."""

    records: list[Example | None]
    """One a row, None for a row that nothing can be learned from. Each with `input_ids` and,
    of the same length, `labels`: the token id in an answer, else -100. At most max_length
    tokens, at least one of them of an answer. A preference has both twice: both answers are
    learned from the first token in which the two differ from their common beginning."""
    columns: dict[tuple[str, ...], int] = field(default_factory=dict)
    """How many rows were read from which columns."""
    unusable: dict[str, list[int]] = field(default_factory=dict)
    """The places of rows without an example, by reason."""
    truncated: list[int] = field(default_factory=list)
    """The places of examples whose end the length limit cut."""
    cut_left: list[int] = field(default_factory=list)
    """The places of examples whose question lost its beginning."""

    texts: list[int] = field(default_factory=list)
    """The places of examples that are plain text."""

    @property
    def examples(self) -> list[Example]:
        """The examples alone, without the rows that have none."""
        return [example for example in self.records if example is not None]

    def packed(self, max_length: int) -> list[Example]:
        """Return the examples with plain texts laid end to end, in pieces of one length.

        Only where a row is no unit of privacy: a piece holds parts of several.

        Args:
            max_length: Of a piece.
        """
        texts = set(self.texts)
        pieces = [
            example
            for place, example in enumerate(self.records)
            if example is not None and place not in texts
        ]
        ids: list[int] = []
        labels: list[int] = []
        for place in self.texts:
            example = self.records[place]
            if example is not None:
                ids += example["input_ids"]
                labels += example["labels"]
        for start in range(0, len(ids), max_length):
            end = start + max_length
            piece = {"input_ids": ids[start:end], "labels": labels[start:end]}
            if any(label >= 0 for label in piece["labels"][1:]):
                pieces.append(piece)
        return pieces


def tokenize(
    rows: "Iterable[Row | None] | Dataset",
    tokenizer: "PreTrainedTokenizerBase",
    config: DataConfig,
    max_length: int,
    vocabulary: int | None = None,
    whole_texts: bool = False,
) -> Tokenized:
    """Turn every row into an example, or into None. Total.

    With a chat template: the conversation as the template renders it, tokenised once; an
    answer begins at the first token that differs from the conversation up to it (TRL 1.16,
    `SFTTrainer._prepare_dataset`). Without one: an Alpaca-style text, with the end token
    after each answer. A preference: two such texts. Plain text: with the end token after it, all of it learned. An example
    longer than max_length loses its end.

    Args:
        rows: The rows; None for one that cannot be read.
        tokenizer: The base model's tokenizer.
        config: Names columns and shape.
        max_length: Longest example in tokens.
        vocabulary: Rows of the model's embedding; None: not known.
        whole_texts: Whether plain text may be longer, to be packed.

    Guarantee:
        There are as many entries as rows. An entry is a function of its row alone, and no
        row raises an error, whatever it holds.
    """
    work = _Work(tokenizer, config, Limits(max_length, vocabulary, whole_texts))
    rendered = [work.render(place, row) for place, row in enumerate(_each(rows))]
    return work.examples(rendered)


class _Work:
    """Rows on their way to examples, with all that is counted."""

    def __init__(
        self, tokenizer: "PreTrainedTokenizerBase", config: DataConfig, limits: Limits
    ) -> None:
        self._tokenizer = tokenizer
        self._config = config
        self._limits = limits
        self._renderer = Renderer(tokenizer, config)
        self._ends = set(end_marks(tokenizer))
        self._found = Tokenized([])

    def render(self, place: int, row: Row | None) -> tuple[Rendered, ...]:
        """Return a row's text, the two of a preference, or count why it has none."""
        if row is None:
            self._count_unusable(place, _UNREADABLE)
            return ()
        try:
            content = read_row(self._config, row)
            rendered = tuple(map(self._renderer.render, _parts(content)))
        except UnusableRowError as error:
            self._count_unusable(place, str(error))
            return ()
        except Exception as error:  # noqa: BLE001 - a row may hold anything
            self._count_unusable(place, f"{type(error).__name__}: {error}"[:200])
            return ()
        columns = self._found.columns
        columns[content.columns] = columns.get(content.columns, 0) + 1
        return rendered

    def examples(self, rendered: Sequence[tuple[Rendered, ...]]) -> Tokenized:
        """Return all rows as examples."""
        encoded = iter(self._encoded([one for parts in rendered for one in parts]))
        for place, parts in enumerate(rendered):
            tokens = [next(encoded) for _ in parts]
            example = self._example(place, parts, tokens) if parts else None
            self._found.records.append(example)
        return self._found

    def _count_unusable(self, place: int, reason: str) -> None:
        self._found.unusable.setdefault(reason, []).append(place)

    def _encoded(self, known: Sequence[Rendered]) -> Iterator[list[list[int]] | str]:
        """Yield the tokens of each text and of its beginnings; or why there are none."""
        texts = [_beginnings(one) for one in known]
        groups: dict[bool, list[str]] = {True: [], False: []}
        for one, parts in zip(known, texts, strict=True):
            groups[one.adds_special] += parts
        try:
            tokens = {
                adds: iter(encode(self._tokenizer, group, adds))
                for adds, group in groups.items()
            }
        # Half a character, for one; a tokenizer in Rust panics with a BaseException.
        except BaseException as error:  # noqa: BLE001 - see above
            _raise_if_of_process(error)
            yield from map(self._encoded_alone, known)
            return
        for one, parts in zip(known, texts, strict=True):
            yield [next(tokens[one.adds_special]) for _ in parts]

    def _encoded_alone(self, one: Rendered) -> list[list[int]] | str:
        try:
            return encode(self._tokenizer, _beginnings(one), one.adds_special)
        except BaseException as error:  # noqa: BLE001 - as for all texts together
            _raise_if_of_process(error)
            return f"not text for the tokenizer: {type(error).__name__}"

    def _example(
        self,
        place: int,
        parts: Sequence[Rendered],
        encoded: Sequence[list[list[int]] | str],
    ) -> Example | None:
        """Return the labelled tokens of a row within the limits."""
        try:
            sides = [self._labelled(*one) for one in zip(parts, encoded, strict=True)]
            if len(sides) == 2:
                return self._pair(place, sides)
            if not parts[0].spans:
                self._found.texts.append(place)
                if self._limits.whole_texts:
                    ids, labels = sides[0]
                    return {"input_ids": ids, "labels": labels}
            ids, labels = self._within(place, sides)[0]
            return {"input_ids": ids, "labels": labels}
        except UnusableRowError as error:
            self._count_unusable(place, str(error))
            return None

    def _labelled(self, one: Rendered, encoded: list[list[int]] | str) -> _Labelled:
        """Return the tokens of one text, and the labels.

        Raises:
            UnusableRowError: Nothing of it can be learned.
        """
        if isinstance(encoded, str):
            raise UnusableRowError(encoded)
        if one.spans:
            ids, labels = self._answers(one, encoded)
        else:
            ids, labels = self._text(encoded[0])
        if not ids:
            raise UnusableRowError("no tokens")
        vocabulary = self._limits.vocabulary
        if vocabulary is not None and max(ids) >= vocabulary:
            raise UnusableRowError(
                "a token beyond the model's embedding: the tokenizer is another model's"
            )
        return ids, labels

    def _pair(self, place: int, sides: Sequence[_Labelled]) -> Example:
        """Return a preference, of which both answers are compared from one token on.

        The end of a prompt and the beginning of an answer may be one token: what follows the
        common tokens is then compared whole (as in TRL 1.16, `DPOTrainer._prepare_dataset`).
        """
        first = min(_first_learned(labels) for _, labels in sides)
        for ids, labels in sides:
            own = _first_learned(labels)
            labels[first:own] = ids[first:own]
        (chosen, chosen_labels), (rejected, rejected_labels) = self._within(
            place, sides
        )
        if chosen == rejected:
            raise UnusableRowError(_SAME)
        return pair_of(
            {"input_ids": chosen, "labels": chosen_labels},
            {"input_ids": rejected, "labels": rejected_labels},
        )

    def _text(self, ids: list[int]) -> tuple[list[int], list[int]]:
        """Return a plain text's tokens with an end, of which all but the first are learned."""
        end = self._tokenizer.eos_token_id
        if end is not None and ids[-1:] != [end]:
            ids = [*ids, int(end)]
        return ids, [-100, *ids[1:]]

    def _answers(
        self, one: Rendered, encoded: list[list[int]]
    ) -> tuple[list[int], list[int]]:
        """Return a conversation's tokens, of which the answers are learned.

        Raises:
            UnusableRowError: No end of an answer can be learned, or the template's own mask
                does not mark it.
        """
        ids, *parts = encoded
        beginnings = iter(parts)
        labels = [-100] * len(ids)
        for _, end in one.spans:
            first = common_prefix_length(next(beginnings), ids)
            last = len(ids)
            if end < len(one.text):
                last = common_prefix_length(next(beginnings), ids)
            if one.mask is not None and one.mask[0] == ids:
                first, last = self._by_mask(one.mask[1], first, last)
            if not self._ends_there(ids[first:last]):
                raise UnusableRowError("no end of the answer can be learned")
            labels[first:last] = ids[first:last]
        if one.mask is not None and one.mask[0] == ids and one.is_whole:
            outside = zip(one.mask[1], labels, strict=True)
            if any(marked and label < 0 for marked, label in outside):
                raise UnusableRowError(_OTHER_MASK)
        return ids, labels

    def _by_mask(self, mask: list[int], first: int, last: int) -> tuple[int, int]:
        """Return the part of an answer that the template's own mask marks.

        Where it leaves out the token that ends the answer, that is learned all the same.

        Raises:
            UnusableRowError: It marks no token of the answer.
        """
        marked = [place for place in range(first, last) if mask[place]]
        if not marked:
            raise UnusableRowError(_OTHER_MASK)
        return marked[0], last

    def _ends_there(self, ids: list[int]) -> bool:
        return not self._ends.isdisjoint(ids[-_LAST_TOKENS:])

    def _within(self, place: int, sides: Sequence[_Labelled]) -> list[_Labelled]:
        """Return the texts of a row within the length limit, and count what it loses.

        Of a preference both lose the same beginning: the answers are to one question.

        Raises:
            UnusableRowError: An answer is beyond the limit.
        """
        limit, sides = self._limits.max_length, list(sides)
        over = max(len(ids) for ids, _ in sides) - limit
        if over > 0 and self._config.long_questions == "cut-left":
            # What begins a text is kept: models want it there.
            kept = int(sides[0][0][0] == self._tokenizer.bos_token_id)
            # The first token of an answer is learned from one before it.
            first = min(_first_learned(labels) for _, labels in sides)
            dropped = min(over, first - max(kept, 1))
            if dropped > 0:
                sides = [
                    (
                        ids[:kept] + ids[kept + dropped :],
                        labels[:kept] + labels[kept + dropped :],
                    )
                    for ids, labels in sides
                ]
                self._found.cut_left.append(place)
        for ids, labels in sides:
            if _first_learned(labels) >= min(len(ids), limit):
                raise UnusableRowError(CUT_AWAY)
        if any(len(ids) > limit for ids, _ in sides):
            self._found.truncated.append(place)
        return [(ids[:limit], labels[:limit]) for ids, labels in sides]


def _parts(content: Content) -> tuple[Conversation | PlainText, ...]:
    """Return what is rendered of a row: one text, or the two of a preference."""
    if isinstance(content, Preference):
        return content.chosen, content.rejected
    return (content,)


def _first_learned(labels: Sequence[int]) -> int:
    """Return the place of the first token that is learned; past the end if none is."""
    return next((i for i, label in enumerate(labels) if label >= 0), len(labels))


def _beginnings(one: Rendered) -> list[str]:
    """Return a text, and its beginnings up to where each answer begins and ends."""
    texts = [one.text]
    for start, end in one.spans:
        texts.append(one.text[:start])
        if end < len(one.text):
            texts.append(one.text[:end])
    return texts


def _raise_if_of_process(error: BaseException) -> None:
    """Raise an error again that ends the process, and is about no row."""
    if isinstance(error, (KeyboardInterrupt, SystemExit, GeneratorExit)):
        raise error


def _each(rows: "Iterable[Row | None] | Dataset") -> Iterator[Row | None]:
    """Yield rows one by one; of a data set by the thousand, since it is slow by single rows."""
    if not hasattr(rows, "column_names"):
        yield from rows
        return
    data: Any = rows
    for columns in data.iter(batch_size=1000):
        for cells in zip(*columns.values(), strict=True):
            yield dict(zip(columns, cells, strict=True))
