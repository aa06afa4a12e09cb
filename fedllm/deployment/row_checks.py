"""A node's own rows, looked at before any run; nothing of it leaves the machine.

Reports numbers of rows and where the first ones are, never what a row says. No model is
fetched: what needs the tokenizer is left out if that is not on this machine.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from fedllm.config import RunConfig
from fedllm.data.columns import PREFERENCES, Row, column_of, used_part
from fedllm.data.identifiers import IdentifierFinder
from fedllm.data.model_limits import require_positions, vocabulary_of
from fedllm.data.overlap import conversation_digest
from fedllm.data.persons import by_person, person_id
from fedllm.data.preferences import Preference
from fedllm.data.readers import comma_list, read_records
from fedllm.data.shapes import PlainText, read_row
from fedllm.data.tokens import CUT_AWAY, Tokenized, texts_of, tokenize
from fedllm.data.turns import UnusableRowError
from fedllm.deployment.preflight import Check
from fedllm.deployment.rendered_rows import (
    content,
    local_base,
    template_check,
    where,
)
from fedllm.errors import ConfigError, DataError, FedllmError
from fedllm.foreign_text import printable
from fedllm.planning.record_noise import record_plan

Rows = list[Row | None]


def row_checks(path: Path, config: RunConfig, country: str | None) -> Iterator[Check]:
    """Yield what there is to say of a node's file.

    Args:
        path: A file or a folder, as `data-path` names it.
        config: The settings that the node expects of a run: columns, model, limits.
        country: Two letters, for national numbers; None: those of no country.
    """
    said: list[str] = []
    try:
        whole = read_records(path.expanduser(), config.data, said.append)
    except DataError as error:
        yield Check("file", "FAIL", str(error))
        return
    if said:
        yield Check("file", "note", "; ".join(said))
    names = dict.fromkeys(str(name) for row in whole if row for name in row)
    rows = [None if row is None else used_part(config.data, row) for row in whole]
    yield _columns(rows, names, config)
    yield _answers(rows, config)
    if config.data.person_column:
        yield _persons(rows, config.data.person_column, names)
    yield _duplicates(rows, config)
    yield from _tokens(rows, config)
    yield _minimum(rows, config)
    yield _identifiers(rows, config, country)


def _columns(rows: Rows, names: Iterable[str], config: RunConfig) -> Check:
    """Report which columns train and which are only there."""
    data = config.data
    used = {data.person_column} & {column_of(data, name) for name in names}
    for row in rows:
        if (found := content(row, config)) is not None:
            used |= {*found.columns}
    unused = {name for name in names if column_of(data, name) not in used}
    text = f"used: {_names(used)}; not used: {_names(unused)}"
    if not used - {data.person_column}:
        remedy = "data.prompt-column and data.response-column name them (--run-config)"
        missing = {data.prompt_column, data.response_column}
        if data.format == "preference":
            remedy, missing = "dpo needs prompt, chosen, rejected", {*PREFERENCES}
        return Check("columns", "FAIL", f"no {_names(missing)}; {text}", remedy)
    return Check("columns", "ok", text)


def _answers(rows: Rows, config: RunConfig) -> Check:
    """Count the rows of which nothing can be learned, by reason."""
    broken: list[int] = []
    unusable: dict[str, list[int]] = {}
    for number, row in enumerate(rows, 1):
        if row is None:
            broken.append(number)
            continue
        try:
            read_row(config.data, row)
        except UnusableRowError as error:
            unusable.setdefault(str(error), []).append(number)
    text = f"{len(rows)} rows"
    for what, numbers in (("malformed", broken), *unusable.items()):
        text += f"; {what}: {len(numbers)}{where(numbers)}" if numbers else ""
    num_unusable = sum(map(len, unusable.values()))
    if len(broken) + num_unusable == len(rows):
        return Check("rows", "FAIL", text, "name a file of questions and answers")
    if broken and config.privacy.unit != "record":
        return Check("rows", "FAIL", text, "mend the malformed rows: no run reads them")
    remedy = "no run learns from these rows" if broken or unusable else ""
    return Check("rows", "warn" if remedy else "ok", text, remedy)


def _persons(rows: Rows, column: str, names: Iterable[str]) -> Check:
    """Count persons, and refuse rows that are nobody's: a run learns nothing from them."""
    if not any(row is not None and column in row for row in rows):
        text = f"no row has the column {column!r}; the columns are {_names({*names})}"
        return Check("persons", "FAIL", text, "data.person-column names it")
    cells = [None if row is None else row.get(column) for row in rows]
    persons = by_person(cells)
    nobody = [place + 1 for place in persons.without_id]
    most = max(map(len, persons.places), default=0)
    text = f"{len(persons.places)} persons by {column!r}, {most} rows at most"
    if nobody:
        text += f"; without an id: {len(nobody)} rows{where(nobody)}"
        return Check("persons", "FAIL", text, "name whose row each is, or take it out")
    first = {person_id(cells[p[0]]): p[0] + 1 for p in persons.places}
    alike: dict[str, list[int]] = {}
    for name, number in first.items():
        alike.setdefault(_loosely(str(name)), []).append(number)
    doubtful = sorted(n for numbers in alike.values() if numbers[1:] for n in numbers)
    if doubtful:
        text += (
            f"; {len(doubtful)} ids differ from another in case, blanks or leading zeros "
            f"alone{where(doubtful)}"
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
    text = f"{len(numbers)} rows are copies of earlier ones{where(numbers)}"
    remedy = "a record stands for a person only where each has one row"
    if config.data.person_column:
        remedy = "copies weigh more, within their person's clip"
    return Check("duplicates", *(("warn", text, remedy) if numbers else ("ok", text)))


def _tokens(rows: Rows, config: RunConfig) -> Iterator[Check]:
    """Look at the rows as the model sees them: by its own tokenizer and chat template."""
    name, limit = config.model.name, config.train.max_length
    try:
        tokenizer, base = local_base(name)
    except FedllmError as error:
        text = " ".join(str(error).split())
        yield Check("length", "note", f"not looked at: {text}")
        return
    try:
        require_positions(limit, base)
    except ConfigError as error:
        yield Check("length", "FAIL", str(error))
        return
    found = tokenize(rows, tokenizer, config.data, limit, vocabulary_of(base))
    yield template_check(found, rows, config)
    yield _lengths(found, config)


def _lengths(found: Tokenized, config: RunConfig) -> Check:
    """Count tokens, and what `train.max-length` cuts."""
    limit = config.train.max_length
    lengths = sorted(
        len(text["input_ids"])
        for example in found.examples
        for text in texts_of(example)
    )
    if not lengths:
        return Check("length", "FAIL", "no row has tokens to learn from")
    cut = [place + 1 for place in found.truncated]
    lost = [place + 1 for place in found.unusable.get(CUT_AWAY, ())]
    left = [place + 1 for place in found.cut_left]
    middle = lengths[len(lengths) // 2]
    text = (
        f"{sum(lengths)} tokens of {config.model.name}, {middle} in the middle, "
        f"{lengths[-1]} at most; train.max-length {limit} cuts the end of "
        f"{len(cut)}{where(cut)} and the whole answer of {len(lost)}{where(lost)}"
    )
    if left:
        text += f", and the beginning of the question of {len(left)}{where(left)}"
    remedy = ""
    if cut or lost:
        remedy = "raise train.max-length, shorten the rows, or data.long-questions"
    return Check("length", "warn" if remedy else "ok", text, remedy)


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
        f"{kinds or 'none'}{where(numbers)} (names and postal addresses are not found)"
    )
    remedy = "take them out: a model may learn a row by heart" if numbers else ""
    return Check("identifiers", "warn" if remedy else "ok", text, remedy)


def _text(row: Row | None, config: RunConfig) -> str:
    """Return all that a row trains on; empty if nothing."""
    found = content(row, config)
    if found is None:
        return ""
    if isinstance(found, PlainText):
        return found.text
    turns = list(found.turns)
    if isinstance(found, Preference):
        turns += found.rejected.turns
    return "\n".join(turn["content"] for turn in turns)


def _names(names: set[str]) -> str:
    return printable(comma_list(sorted(names))) if names else "none"
