"""Rows as the model sees them: by its own tokenizer and chat template, if those are here.

Finds before a run what would fail in a client: a template that leaves out an answer or
rejects a turn, an answer without an end, tokens beyond the embedding, and too few positions.
"""

from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedllm.config import RunConfig, fedllm_home
from fedllm.data.columns import Row
from fedllm.data.embedded import EMBEDDED
from fedllm.data.model_limits import require_positions, vocabulary_of
from fedllm.data.readers import looks_local
from fedllm.data.rows import load_rows
from fedllm.data.shapes import Content, read_row
from fedllm.data.tokens import CUT_AWAY, Tokenized, texts_of, tokenize
from fedllm.deployment.preflight import Check, cached_model
from fedllm.errors import ConfigError, FedllmError
from fedllm.foreign_text import printable
from fedllm.models.known import BUILT_IN_MODEL

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

Rows = list[Row | None]
_SHOWN = 5
_RENDERED = 3
_LOOKED_AT = 1000
_MOST_CHARACTERS = 700
LEARNED = (">>>", "<<<")
"""Stand around what is learned of a row that is shown."""


def rendered_checks(config: RunConfig) -> Iterator[Check]:
    """Yield what the base model makes of the training rows, and three of them.

    Nothing is fetched: without the tokenizer, or with rows of a hub, a note says so.
    """
    name = config.data.name
    if name not in EMBEDDED and not looks_local(name):
        text = f"not looked at: the rows of {name!r} are not here"
        yield Check("template", "note", f"{text} (--node FILE looks at a node's own)")
        return
    try:
        tokenizer, base = local_base(config.model.name)
    except FedllmError as error:
        yield Check("template", "note", f"not looked at: {_one_line(error)}")
        return
    try:
        require_positions(config.train.max_length, base)
        rows: Rows = list(islice(load_rows(config.data), _LOOKED_AT))
    except FedllmError as error:
        yield Check("template", "FAIL", _one_line(error))
        return
    length = config.train.max_length
    found = tokenize(rows, tokenizer, config.data, length, vocabulary_of(base))
    yield template_check(found, rows, config)
    shown = [(i, one) for i, one in enumerate(found.records) if one is not None]
    for place, example in shown[:_RENDERED]:
        text = " | ".join(marked(tokenizer, one) for one in texts_of(example))
        yield Check(f"row {place + 1}", "ok", text)


def marked(tokenizer: "PreTrainedTokenizerBase", example: Mapping[str, Any]) -> str:
    """Return an example as one line of text, with marks around what is learned.

    Args:
        tokenizer: Made it.
        example: The tokens and labels.
    """
    parts: list[str] = []
    run: list[int] = []
    was_learned = False
    pairs = zip(example["input_ids"], example["labels"], strict=True)
    for token, label in [*pairs, (-1, None)]:
        is_learned = label is not None and label >= 0
        if run and (label is None or is_learned != was_learned):
            text = str(tokenizer.decode(run))
            parts.append(f"{LEARNED[0]}{text}{LEARNED[1]}" if was_learned else text)
            run = []
        run.append(token)
        was_learned = is_learned
    text = "".join(parts)
    if len(text) > _MOST_CHARACTERS:
        half = _MOST_CHARACTERS // 2
        text = f"{text[:half]} ... {text[-half:]}"
    return printable(text, None)


def template_check(found: Tokenized, rows: Rows, config: RunConfig) -> Check:
    """Report what the model's template and tokenizer reject of rows that are well."""
    causes = {
        reason: [place + 1 for place in places]
        for reason, places in found.unusable.items()
        if any(content(rows[place], config) is not None for place in places)
        and reason != CUT_AWAY
    }
    num_usable = len(found.examples)
    text = f"{num_usable} of {len(rows)} rows can be learned from"
    text += "".join(f"; {why}: {len(at)}{where(at)}" for why, at in causes.items())
    if not num_usable:
        remedy = (
            "another model, or data.merge-turns=true where its template rejects turns"
        )
        if not causes:
            remedy = "raise train.max-length, or name other rows"
        return Check("template", "FAIL", text, remedy)
    if causes:
        return Check("template", "warn", text, "no run learns from these rows")
    return Check("template", "ok", text)


def content(row: Row | None, config: RunConfig) -> Content | None:
    """Return what is learned from a row; None if nothing is."""
    try:
        return None if row is None else read_row(config.data, row)
    except Exception:  # noqa: BLE001 - a row may hold anything
        return None


def local_base(
    name: str,
) -> "tuple[PreTrainedTokenizerBase, PretrainedConfig]":
    """Load the tokenizer and the configuration of a base model that is on this machine.

    Raises:
        ConfigError: It is not.
        ModelError: It cannot be read.
    """
    from fedllm.models.loading import load_tokenizer
    from fedllm.models.location import load_config

    folder: Path | None = Path(name).expanduser()
    if name == BUILT_IN_MODEL.name:
        folder = fedllm_home() / "models" / name
    elif not Path(name).expanduser().is_dir():
        cached = cached_model(name)
        folder = None if cached is None else Path(cached)
    if folder is None or not folder.is_dir():
        raise ConfigError(f"the tokenizer of {name} is not on this machine")
    return load_tokenizer(str(folder)), load_config(str(folder))


def where(numbers: list[int]) -> str:
    """Return where the first rows are, as a file's owner counts."""
    if not numbers:
        return ""
    more = ", ..." if len(numbers) > _SHOWN else ""
    return f" (row {', '.join(map(str, numbers[:_SHOWN]))}{more})"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
