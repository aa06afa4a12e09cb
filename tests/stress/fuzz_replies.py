"""Random replies through the real strategy: none may raise or pass the clipping norm.

    python -m tests.fuzz_replies --replies 100000 --seed 1

Each reply is a round of its own, in a private run whose noise is switched off by the
audit's bench: what enters the server optimiser is then what that one reply added.
Contents come from hypothesis: records of any kind under any name; arrays of any type, shape
and value under the declared names; an honest client's bytes, damaged; errors; and every
kind of the audit.
"""

import argparse
import collections
import resource
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import hypothesis.strategies as st
import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, MetricRecord, RecordDict
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.extra import numpy as hnp

from fedllm.auditing.harness import Bench, Setup, norm_of
from fedllm.auditing.hostile_replies import Content, hostile_replies, packed_replies
from fedllm.config import Encoding, WireConfig
from fedllm.config_parsing import parse_run_config
from fedllm.planning.noise import privacy_settings
from fedllm.wire.messages import ARRAYS, ERROR, METRICS, encoded_record

CLIP = 0.5
SIZE = 64
# A ledger is written whole each round, so it is begun anew before it grows.
_ROUNDS = 100
KEYS = st.sampled_from([ARRAYS, METRICS, ERROR, "config", "x"])
TEXTS = st.text(max_size=12)
NUMBERS = st.one_of(st.integers(-(2**63), 2**63 - 1), st.floats())
DTYPES = st.one_of(
    hnp.floating_dtypes(sizes=(16, 32, 64)),
    hnp.integer_dtypes(),
    hnp.unsigned_integer_dtypes(),
    hnp.boolean_dtypes(),
    hnp.complex_number_dtypes(),
)


def any_array(draw: Any, declared: Array) -> Array:
    """Draw an array as declared or otherwise, and perhaps lie about it."""
    shape = tuple(declared.shape)
    shapes = st.one_of(st.just(shape), hnp.array_shapes(min_dims=0, max_side=5))
    dtype = draw(DTYPES) if draw(st.integers(0, 3)) == 0 else np.dtype(declared.dtype)
    value = draw(hnp.arrays(dtype, draw(shapes)))
    if draw(st.integers(0, 3)):
        value = np.resize(value if value.size else np.zeros(1, value.dtype), shape)
    array = Array(np.asarray(value))
    return array if draw(st.integers(0, 3)) else damaged(draw, array)


def damaged(draw: Any, array: Array) -> Array:
    """Cut, lengthen or overwrite some of an array's bytes, or what is said of them."""
    data = bytearray(array.data)
    for _ in range(draw(st.integers(0, 3))):
        at = draw(st.integers(0, max(0, len(data) - 1)))
        piece = draw(st.binary(max_size=8))
        kind = draw(st.sampled_from(["write", "insert", "cut"]))
        if kind == "write":
            data[at : at + len(piece)] = piece
        elif kind == "insert":
            data[at:at] = piece
        else:
            del data[at : at + len(piece)]
    stype = draw(st.sampled_from(["numpy.ndarray", "numpy.ndarray", "pickle", ""]))
    return Array(array.dtype, tuple(array.shape), stype, bytes(data))


@st.composite
def contents(draw: Any, bench: Bench, kinds: dict[str, Content]) -> Content:
    """Draw what one client sends."""
    encoding = bench.config.wire.encoding
    choice = draw(st.sampled_from(["kind", "honest", "arrays", "records", "error"]))
    if choice == "kind":
        return kinds[draw(st.sampled_from(sorted(kinds)))]
    if choice == "error":
        return Error(draw(st.integers(0, 99)), draw(st.one_of(st.none(), TEXTS)))
    if choice == "records":
        return RecordDict(
            draw(st.dictionaries(KEYS, st.one_of(metrics(), configs()), max_size=3))
        )
    far = {
        name: value + np.float32(draw(st.floats(-9, 9, width=32)))
        for name, value in bench.start.items()
    }
    record = encoded_record(far, encoding, np.random.default_rng(0))
    named = {
        name: (
            (damaged(draw, array) if draw(st.booleans()) else array)
            if choice == "honest"
            else any_array(draw, array)
        )
        for name, array in record.items()
    }
    if draw(st.integers(0, 3)) == 0:
        named[draw(TEXTS) or "another"] = Array(np.ones(2, np.float32))
    content = RecordDict({ARRAYS: ArrayRecord(named)})
    if draw(st.booleans()):
        content[METRICS] = draw(metrics())
    return content


def metrics() -> st.SearchStrategy[MetricRecord]:
    names = st.sampled_from(["num-examples", "train-loss", "eval-loss", "epsilon", "x"])
    values = st.one_of(NUMBERS, st.lists(st.integers(0, 9), min_size=1, max_size=3))
    return st.dictionaries(names, values, max_size=4).map(MetricRecord)


def configs() -> st.SearchStrategy[ConfigRecord]:
    names = st.sampled_from(["code", "text", "server-round", "x"])
    values = st.one_of(NUMBERS, TEXTS, st.binary(max_size=9), st.booleans())
    return st.dictionaries(names, values, max_size=3).map(ConfigRecord)


def fuzz(
    encoding: Encoding,
    num_replies: int,
    start: int,
    told: Callable[[int], None] = lambda _: None,
) -> tuple[float, collections.Counter[str]]:
    """Send random replies, each in a round of its own.

    Returns:
        The largest norm that one added to the sum, in units of C, and how often a reply
        was turned away with which code ("" for those that counted).

    Raises:
        Whatever a reply made the server raise: there should be nothing.
    """
    config = parse_run_config(
        {"privacy.clipping-norm": CLIP, "num-server-rounds": _ROUNDS}
    )
    config = replace(config, wire=WireConfig(encoding=encoding))
    setup = Setup(config, privacy_settings(config, 2, SIZE), SIZE)
    worst, codes, done = 0.0, collections.Counter[str](), 0
    while done < num_replies:
        count = min(_ROUNDS, num_replies - done)
        with setup.bench(SIZE, 2, silent=True, config=config) as bench:
            sizes = send_to(bench, count, start + done, codes)
        worst = max([worst, *sizes])
        done += len(sizes)
        told(done)
    return worst, codes


def send_to(
    bench: Bench, count: int, start: int, codes: collections.Counter[str]
) -> list[float]:
    """Send replies to one bench, and return what each added, in units of C."""
    encoding, sizes = bench.config.wire.encoding, []
    kinds = (
        hostile_replies(bench.start, CLIP)
        if encoding == "float32"
        else packed_replies(bench.start, encoding)
    )

    @seed(start)
    @settings(
        max_examples=count,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(st.data())
    def send(data: st.DataObject) -> None:
        content = data.draw(contents(bench, kinds))
        released = bench.release(len(sizes) + 1, [(1, content)])
        sizes.append(norm_of(released) / CLIP)
        assert sizes[-1] <= 1 + 1e-9, f"{encoding}: {sizes[-1]} C by {content}"
        rejected = bench.strategy.round.rejected
        codes[rejected[-1][1] if rejected else ""] += 1
        rejected.clear()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # NumPy warns of hostile headers.
        send()
    return sizes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--replies", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    began, total = time.monotonic(), collections.Counter[str]()
    first = None
    for encoding in ("float32", "float16", "int8"):
        share = -(-args.replies // 3)

        def told(done: int, encoding: str = encoding) -> None:
            if done % 5000 < _ROUNDS:
                sys.stderr.write(f"{encoding}: {done} replies\n")

        worst, codes = fuzz(encoding, share, args.seed * 10_000_019, told)
        first = first or megabytes()
        total += codes
        sys.stdout.write(f"{encoding}: largest sum of one reply {worst:.12f} C\n")
    sys.stdout.write(
        f"{sum(total.values()):,} replies, none raised, in "
        f"{time.monotonic() - began:.0f} s; {total[''] :,} counted, turned away: "
        + ", ".join(f"{code} {n:,}" for code, n in total.most_common() if code)
        + f"; memory at its peak {megabytes():.0f} MB ({first:.0f} after a third)\n"
    )


def megabytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
