"""The server alone: seconds and memory of aggregating, and of a whole ServerApp.

    python benchmarks/server.py aggregate
    python benchmarks/server.py aggregate --replies 10000 --kind lora-core
    python benchmarks/server.py memory

`aggregate` lets the strategy of a private run read, clip, sum and noise replies of an
adapter of OpenLLaMA-3B's shape, one after the other as from the wire, and prints seconds of
the processor and how much memory grew from the first tenth of the replies to the last.
`memory` is the peak of a process that imports the ServerApp, reads the model's
configuration, makes the strategy and aggregates two replies.
"""

import argparse
import json
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from flwr.app import Message, RecordDict

from fedllm.adapters.peft_model import initial_arrays
from fedllm.adapters.resolve import resolve
from fedllm.adapters.spec import AdapterSpec
from fedllm.config import RunConfig
from fedllm.config_parsing import parse_run_config
from fedllm.models.layer_shapes import linear_shapes
from fedllm.planning.noise import privacy_settings
from fedllm.privacy.ledger import Ledger
from fedllm.strategy.build import make_strategy
from fedllm.strategy.client_level_dp import ClientLevelDP
from fedllm.wire.masking import masked
from fedllm.wire.messages import ARRAYS, encoded_record
from fedllm.wire.task_identity import set_task_identity

_MODEL = "openlm-research/open_llama_3b_v2"
_DIFFERENT = 8


def declared(config: RunConfig) -> AdapterSpec:
    """Return the adapter on OpenLLaMA-3B's q and v, without the model."""
    return resolve(
        config.adapter,
        linear_shapes(_MODEL),
        {},
        "llama",
        config.seed,
    )


def aggregate(config: RunConfig, num_replies: int) -> dict[str, float]:
    """Aggregate one round and return seconds and megabytes."""
    spec = declared(config)
    start = initial_arrays(spec)
    generator = np.random.default_rng(0)
    encoding = config.wire.encoding
    contents = []
    for _ in range(_DIFFERENT):
        sent = {
            name: (0 if encoding != "float32" else value)
            + generator.normal(0, 1e-3, value.shape).astype(np.float32)
            for name, value in start.items()
        }
        record = encoded_record(sent, encoding, generator)
        contents.append(masked(RecordDict({ARRAYS: record})))
    memory: list[float] = []

    def replies() -> Iterator[Message]:
        for index in range(num_replies):
            if index in (num_replies // 10, num_replies - 1):
                memory.append(peak_megabytes())
            asked = Message(RecordDict(), index + 1, "train")
            yield Message(contents[index % _DIFFERENT], reply_to=asked)

    population = list(range(1, num_replies + 1))
    with tempfile.TemporaryDirectory() as folder:
        settings = privacy_settings(config, num_replies, spec.num_trainable)
        ledger = Ledger.create(Path(folder) / "privacy.json", settings)
        strategy = make_strategy(config, start, population, ledger)
        assert isinstance(strategy, ClientLevelDP)
        strategy.strategy.round.asked = num_replies
        wall, processor = time.monotonic(), time.process_time()
        strategy.aggregate_train(1, replies())
        wall, processor = time.monotonic() - wall, time.process_time() - processor
    assert not strategy.round.rejected
    return {
        "values": spec.num_trainable,
        "replies": num_replies,
        "processor_seconds": round(processor, 2),
        "wall_seconds": round(wall, 2),
        "megabytes_grown": round(memory[1] - memory[0], 1),
        "megabytes_at_peak": round(peak_megabytes(), 1),
    }


def peak_megabytes() -> float:
    """Return the largest resident size of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("mode", choices=("aggregate", "memory"))
    parser.add_argument("--kind", default="lora")
    parser.add_argument("--encoding", default="float32")
    parser.add_argument("--replies", type=int, default=1000)
    args = parser.parse_args()
    set_task_identity()
    config = parse_run_config(
        {
            "adapter.kind": args.kind,
            "wire.encoding": args.encoding,
            "model.name": _MODEL,
            "privacy.noise-probe": False,
        }
    )
    if args.mode == "memory":
        import fedllm.server_app  # noqa: F401 - its imports are what is measured

        found = aggregate(config, 20)
        bounds = {"megabytes_at_peak": 1024.0}
    else:
        found = aggregate(config, args.replies)
        bounds = {"processor_seconds": 20.0, "megabytes_grown": 50.0}
    met = {name: found[name] <= bound for name, bound in bounds.items()}
    sys.stdout.write(json.dumps({**vars(args), **found, "met": met}) + "\n")
    sys.exit(0 if all(met.values()) else 1)


if __name__ == "__main__":
    main()
