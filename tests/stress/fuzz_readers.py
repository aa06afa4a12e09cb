"""Random files through the readers: each is read, or refused by one line.

    python -m tests.stress.fuzz_readers --files 10000 --seed 1

Contents come from hypothesis: bytes of any kind; JSON of any shape, under the names of
columns that are known; tables in any dialect; honest files, damaged; folders of them. What is
read is taken on to shapes: each row is a conversation, a text, or unusable for a reason.
"""

import argparse
import bz2
import csv
import gzip
import io
import json
import sys
import tempfile
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pyarrow as pa
from hypothesis import HealthCheck, Phase, given, seed, settings
from pyarrow import parquet

from fedllm.config import DataConfig
from fedllm.data.readers import _READERS
from fedllm.data.records import load_records
from fedllm.data.rows import load_rows
from fedllm.data.shapes import read_row
from fedllm.data.turns import UnusableRowError
from fedllm.errors import DataError

TEXTS = st.text(st.characters(), max_size=20)
NAMES = st.sampled_from(
    [
        "instruction",
        "response",
        "messages",
        "conversations",
        "prompt",
        "completion",
        "input",
        "output",
        "system",
        "text",
        "tools",
        "chosen",
        "rejected",
        "question",
        "answer",
        "Response",
        "site",
    ]
)
LEAVES = TEXTS | st.none() | st.booleans() | st.integers() | st.floats()
TURN_KEYS = st.sampled_from(
    ["role", "content", "from", "value", "weight", "tool_calls", "type", "text"]
)
CELLS = st.recursive(
    LEAVES | st.sampled_from(["user", "assistant", "gpt", "[]", '[{"role": "user"}]']),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(TURN_KEYS | TEXTS, inner, max_size=3),
    max_leaves=8,
)
TURNS = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "human", "Assistant", "gpt", "x"])},
        optional={"content": TEXTS | CELLS, "tool_calls": CELLS},
    ),
    max_size=4,
)
HONEST = st.fixed_dictionaries({"instruction": TEXTS, "response": TEXTS | CELLS}) | (
    st.fixed_dictionaries({"messages": TURNS}, optional={"tools": CELLS})
    | st.fixed_dictionaries(
        {"chosen": TURNS | TEXTS, "rejected": TURNS | TEXTS},
        optional={"prompt": TURNS | TEXTS},
    )
)
ROWS = st.lists(
    HONEST | st.dictionaries(NAMES | TEXTS, CELLS, max_size=4) | CELLS, max_size=4
)
ENDINGS = st.sampled_from([*_READERS, ".jsonl.gz", ".csv.bz2", ".json.xz", ".csv.zst"])
# What honest programs call their files.
ENDING_OF = {
    "bytes": ".txt",
    "json": ".json",
    "lines": ".jsonl",
    "table": ".csv",
    "parquet": ".parquet",
    "arrow": ".arrow",
}
COMPRESSIONS = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress}
ENCODINGS = st.sampled_from(["", "", "", "cp1252", "latin-1", "gb18030", "utf-8"])
FORMATS = st.sampled_from(
    ["auto", "auto", "messages", "question-answer", "text", "preference"]
)
SPLITS = st.sampled_from(["train", "train", "train", "test", "x"])


@st.composite
def named_contents(draw: Any) -> tuple[str, bytes]:
    """Return the ending and the bytes of a file, honest or not."""
    kind = draw(st.sampled_from(list(ENDING_OF)))
    if kind == "bytes":
        data = bytes(draw(st.binary(max_size=60)))
    elif kind in ("parquet", "arrow"):
        data = _columnar(draw, kind)
    elif kind == "table":
        data = _table(draw)
    else:
        rows = draw(ROWS)
        lines = [json.dumps(row) for row in rows]
        text = "\n".join(lines) if kind == "lines" else json.dumps(rows)
        data = text.encode(draw(st.sampled_from(["utf-8", "utf-16", "utf-8-sig"])))
    if draw(st.integers(0, 3)) == 0 and data:
        # With a byte that is gone, or others.
        place = draw(st.integers(0, len(data) - 1))
        data = data[:place] + bytes(draw(st.binary(max_size=2))) + data[place + 1 :]
    if kind == "bytes" or draw(st.integers(0, 5)) == 0:
        return draw(ENDINGS), data
    compressed = draw(st.sampled_from(list(COMPRESSIONS)))
    return ENDING_OF[kind] + compressed, COMPRESSIONS[compressed](data)


def _table(draw: Any) -> bytes:
    out = io.StringIO()
    writer = csv.writer(
        out,
        delimiter=draw(st.sampled_from(",;\t|^")),
        quoting=draw(st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL])),
        lineterminator=draw(st.sampled_from(["\n", "\r\n", "\r"])),
    )
    cells = st.text(st.characters(exclude_categories=["Cs"]), max_size=9)
    heads = st.just(["instruction", "response"]) | st.lists(NAMES | cells, max_size=4)
    writer.writerow(draw(heads))
    rows = st.lists(cells, min_size=2, max_size=2) | st.lists(cells, max_size=4)
    writer.writerows(draw(st.lists(rows, max_size=4)))
    head = draw(st.sampled_from(["", "sep=;\n", 'sep="\n', "sep=\n"]))
    return (head + out.getvalue()).encode("utf-8", "surrogatepass")


def _columnar(draw: Any, kind: str) -> bytes:
    names = draw(st.lists(NAMES, max_size=3, unique=True))
    value = st.text(st.characters(exclude_categories=["Cs"]), max_size=5) | st.none()
    table = pa.table(
        {name: draw(st.lists(value, min_size=2, max_size=2)) for name in names}
    )
    out = io.BytesIO()
    if kind == "parquet":
        parquet.write_table(table, out)
    else:
        with pa.ipc.new_stream(out, table.schema) as stream:
            stream.write_table(table)
    return out.getvalue()


@st.composite
def cases(draw: Any) -> tuple[dict[str, bytes], DataConfig]:
    """Return the files of a folder by name, and the settings that read them."""
    stems = st.sampled_from(
        ["rows", "train", "a/train", "test", "main/test", "._x", "state"]
    )
    files = {}
    for _ in range(draw(st.integers(1, 2))):
        ending, content = draw(named_contents())
        files[draw(stems) + ending] = content
    config = DataConfig(
        encoding=draw(ENCODINGS),
        format=draw(FORMATS),
        split=draw(SPLITS),
        config=draw(st.sampled_from(["", "", "", "", "main"])),
    )
    return files, config


def check(files: dict[str, bytes], config: DataConfig, is_folder: bool) -> Counter[str]:
    """Read one case by both ways; return what became of its rows.

    Raises:
        AssertionError: A refusal is no single line.
    """
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        for name, content in files.items():
            path = Path(folder) / name
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(content)
        where = folder if is_folder else str(Path(folder) / next(iter(files)))
        outcomes: Counter[str] = Counter()
        for load in (load_rows, load_records):
            try:
                rows: Any = load(config, where)
            except DataError as error:
                assert str(error) and len(str(error).splitlines()) == 1, str(error)
                outcomes["refused"] += 1
                continue
            outcomes.update(_shape(config, row) for row in rows)
        return outcomes


def _shape(config: DataConfig, row: dict[str, Any] | None) -> str:
    if row is None:
        return "malformed"
    try:
        return type(read_row(config, row)).__name__
    except UnusableRowError as error:
        assert str(error)
        return "unusable"


def fuzz(num_files: int, start: int) -> Counter[str]:
    """Return how many refusals, and rows of each kind, there were.

    Args:
        num_files: Number of cases.
        start: Seed of what is drawn.
    """
    found: Counter[str] = Counter()

    @seed(start)
    @settings(
        max_examples=num_files,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=cases(), is_folder=st.booleans())
    def one(case: tuple[dict[str, bytes], DataConfig], is_folder: bool) -> None:
        found.update(check(*case, is_folder))

    one()
    return found


def main() -> None:
    """Fuzz as long as asked, and print the outcomes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--files", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    # Readers warn of what is malformed, which most files here are.
    warnings.simplefilter("ignore")
    found = fuzz(args.files, args.seed)
    for outcome, count in found.most_common():
        sys.stdout.write(f"{count:>8}  {outcome}\n")


if __name__ == "__main__":
    main()
