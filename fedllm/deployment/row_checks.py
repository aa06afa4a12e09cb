"""A node's own rows, looked at before any run; nothing of it leaves the machine.

Reports numbers of rows and where the first ones are, never what a row says. No model is
fetched: what needs the tokenizer is left out if that is not on this machine.
"""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from fedllm.config import RunConfig, fedllm_home
from fedllm.data.identifiers import IdentifierFinder
from fedllm.data.overlap import conversation_digest
from fedllm.data.persons import by_person, person_id
from fedllm.data.prompts import MESSAGES, to_prompt_completion
from fedllm.data.readers import Row, comma_list, read_records
from fedllm.data.records import tokenize_records
from fedllm.deployment.preflight import Check, cached_model
from fedllm.errors import ConfigError, DataError, FedllmError
from fedllm.foreign_text import printable
from fedllm.models.known import BUILT_IN_MODEL
from fedllm.planning.record_noise import record_plan

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Rows = list[Row | None]
_SHOWN = 5
_NO_LIMIT = 1 << 40


def row_checks(path: Path, config: RunConfig, country: str | None) -> Iterator[Check]:
    """Yield what there is to say of a node's file.

    Args:
        path: A file or a folder, as `data-path` names it.
        config: The settings that the node expects of a run: columns, model, limits.
        country: Two letters, for national numbers; None: those of no country.
    """
    try:
        rows = read_records(path.expanduser())
    except DataError as error:
        yield Check("file", "FAIL", str(error))
        return
    yield _columns(rows, config)
    yield _answers(rows, config)
    if config.data.person_column:
        yield _persons(rows, config.data.person_column)
    yield _duplicates(rows, config)
    yield _lengths(rows, config)
    yield _minimum(rows, config)
    yield _identifiers(rows, config, country)


def _columns(rows: Rows, config: RunConfig) -> Check:
    """Report which columns train and which are only there."""
    names = dict.fromkeys(str(name) for row in rows if row for name in row)
    wanted = {config.data.prompt_column, config.data.response_column}
    used = {MESSAGES} if MESSAGES in names else wanted
    if config.data.person_column in names:
        used = used | {config.data.person_column}
    text = f"used: {_names(used & {*names})}; not used: {_names({*names} - used)}"
    if missing := used - {*names}:
        remedy = "data.prompt-column and data.response-column name them (--run-config)"
        return Check("columns", "FAIL", f"no {_names(missing)}; {text}", remedy)
    return Check("columns", "ok", text)


def _answers(rows: Rows, config: RunConfig) -> Check:
    """Count the rows of which nothing can be learned."""
    broken, empty = [], []
    for number, row in enumerate(rows, 1):
        try:
            conversation = (
                None if row is None else to_prompt_completion(config.data, row)
            )
        except DataError:
            row = None
        if row is None:
            broken.append(number)
        elif conversation is None:
            empty.append(number)
    text = f"{len(rows)} rows"
    for numbers, what in ((broken, "malformed"), (empty, "without question or answer")):
        text += f"; {what}: {len(numbers)}{_where(numbers)}" if numbers else ""
    if len(broken) + len(empty) == len(rows):
        return Check("rows", "FAIL", text, "name a file of questions and answers")
    if broken and config.privacy.unit != "record":
        return Check("rows", "FAIL", text, "mend the malformed rows: no run reads them")
    remedy = "no run learns from these rows" if broken or empty else ""
    return Check("rows", "warn" if remedy else "ok", text, remedy)


def _persons(rows: Rows, column: str) -> Check:
    """Count persons, and refuse rows that are nobody's: a run learns nothing from them."""
    if not any(row is not None and column in row for row in rows):
        names = {str(name) for row in rows if row for name in row}
        text = f"no row has the column {column!r}; the columns are {_names(names)}"
        return Check("persons", "FAIL", text, "data.person-column names it")
    cells = [None if row is None else row.get(column) for row in rows]
    persons = by_person(cells)
    nobody = [place + 1 for place in persons.without_id]
    most = max(map(len, persons.places), default=0)
    text = f"{len(persons.places)} persons by {column!r}, {most} rows at most"
    if nobody:
        text += f"; without an id: {len(nobody)} rows{_where(nobody)}"
        return Check("persons", "FAIL", text, "name whose row each is, or take it out")
    first = {person_id(cells[p[0]]): p[0] + 1 for p in persons.places}
    alike: dict[str, list[int]] = {}
    for name, number in first.items():
        alike.setdefault(_loosely(str(name)), []).append(number)
    doubtful = sorted(n for numbers in alike.values() if numbers[1:] for n in numbers)
    if doubtful:
        text += (
            f"; {len(doubtful)} ids differ from another in case, blanks or leading zeros "
            f"alone{_where(doubtful)}"
        )
        return Check("persons", "warn", text, "write a person's id in one way")
    return Check("persons", "ok", text)


def _loosely(name: str) -> str:
    """Return an id without what one person's ids may differ in."""
    text = "".join(name.casefold().split())
    return text.lstrip("0") or "0"


def _duplicates(rows: Rows, config: RunConfig) -> Check:
    """Count the rows whose question and answer are those of an earlier one."""
    seen: set[bytes] = set()
    numbers = []
    for number, row in enumerate(rows, 1):
        digest = conversation_digest(config.data, row)
        if digest in seen:
            numbers.append(number)
        elif digest is not None:
            seen.add(digest)
    text = f"{len(numbers)} rows are copies of earlier ones{_where(numbers)}"
    remedy = "a record stands for a person only where each has one row"
    if config.data.person_column:
        remedy = "copies weigh more, within their person's clip"
    return Check("duplicates", *(("warn", text, remedy) if numbers else ("ok", text)))


def _lengths(rows: Rows, config: RunConfig) -> Check:
    """Count tokens, and what `train.max-length` cuts."""
    name = config.model.name
    try:
        tokenizer = _tokenizer(name)
    except FedllmError as error:
        text = " ".join(str(error).split())
        return Check("length", "note", f"not looked at: {text}")
    records = tokenize_records(rows, tokenizer, config.data, _NO_LIMIT)
    limit = config.train.max_length
    lengths: list[int] = []
    cut: list[int] = []
    lost: list[int] = []
    for number, example in enumerate(records.examples, 1):
        if example is None:
            continue
        lengths.append(len(example["input_ids"]))
        if lengths[-1] > limit:
            # Labels begin where the answer does.
            is_lost = all(label < 0 for label in example["labels"][:limit])
            (lost if is_lost else cut).append(number)
    if not lengths:
        return Check("length", "FAIL", "no row has tokens to learn from")
    middle = sorted(lengths)[len(lengths) // 2]
    text = (
        f"{sum(lengths)} tokens of {name}, {middle} in the middle, {max(lengths)} at most; "
        f"train.max-length {limit} cuts the end of {len(cut)}{_where(cut)} and the whole "
        f"answer of {len(lost)}{_where(lost)}"
    )
    remedy = "raise train.max-length, or shorten the rows" if cut or lost else ""
    return Check("length", "warn" if remedy else "ok", text, remedy)


def _tokenizer(name: str) -> "PreTrainedTokenizerBase":
    """Load a tokenizer that is on this machine.

    Raises:
        ConfigError: It is not.
        ModelError: It cannot be read.
    """
    from fedllm.models.loading import load_tokenizer

    folder: Path | None = Path(name).expanduser()
    if name == BUILT_IN_MODEL.name:
        folder = fedllm_home() / "models" / name
    elif not Path(name).expanduser().is_dir():
        cached = cached_model(name)
        folder = None if cached is None else Path(cached)
    if folder is None or not folder.is_dir():
        raise ConfigError(f"the tokenizer of {name} is not on this machine")
    return load_tokenizer(str(folder))


def _minimum(rows: Rows, config: RunConfig) -> Check:
    """Compare the number of rows with what the promised epsilon needs."""
    unit = config.privacy.unit
    if unit != "record":
        text = f"privacy.unit={unit!r}: no number of rows is too small for the promise"
        return Check("minimum", "ok", text)
    number, what = len(rows), "rows"
    column = config.data.person_column
    if column:
        cells = (None if row is None else row.get(column) for row in rows)
        number, what = len(by_person(cells).places), "persons"
    try:
        plan = record_plan(config, number)
    except FedllmError as error:
        return Check("minimum", "FAIL", " ".join(str(error).split()))
    text = (
        f"{number} {what} for batches of {plan['expected_batch_size']}: "
        f"epsilon {plan['epsilon']:.3g} at delta {plan['delta']:.3g} takes noise of "
        f"{plan['noise_multiplier']:.3g} clipping norms"
    )
    return Check("minimum", "ok", text)


def _identifiers(rows: Rows, config: RunConfig, country: str | None) -> Check:
    """Count what looks like a personal identifier in questions and answers."""
    try:
        finder = IdentifierFinder(country)
    except ConfigError as error:
        return Check("identifiers", "note", str(error))
    found: Counter[str] = Counter()
    numbers = []
    for number, row in enumerate(rows, 1):
        in_row = finder.count(_text(row, config))
        found += in_row
        if in_row:
            numbers.append(number)
    kinds = ", ".join(f"{kind}: {n}" for kind, n in sorted(found.items()))
    text = (
        f"{kinds or 'none'}{_where(numbers)} (names and postal addresses are not found)"
    )
    remedy = "take them out: a model may learn a row by heart" if numbers else ""
    return Check("identifiers", "warn" if remedy else "ok", text, remedy)


def _text(row: Row | None, config: RunConfig) -> str:
    """Return all that a row trains on; empty if nothing."""
    try:
        parts = None if row is None else to_prompt_completion(config.data, row)
    except DataError:
        parts = None
    return "\n".join(turn["content"] for part in parts or () for turn in part)


def _where(numbers: list[int]) -> str:
    """Return where the first rows are, as a file's owner counts."""
    if not numbers:
        return ""
    more = ", ..." if len(numbers) > _SHOWN else ""
    return f" (row {', '.join(map(str, numbers[:_SHOWN]))}{more})"


def _names(names: set[str]) -> str:
    return printable(comma_list(sorted(names))) if names else "none"
