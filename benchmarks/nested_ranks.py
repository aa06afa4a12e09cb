"""What unlike ranks cost: one rank for all, nested ranks, and zero-padded unrelated factors.

Half of the clients can train a rank of `--small` only. Without DP, through the trainer of a run
and the mean of a run, in one process:

- `large`: all clients train the whole rank, as if none were small;
- `small`: the run's rank is that of the smallest client;
- `nested`: ffa-lora; small clients train the first columns of B (`adapter-rank`);
- `padded`: both factors are trained; small clients get the first rows of A and columns of B, and
  what they send is filled up with zeros and averaged, factor by factor. Implemented here alone.

The memory is that of the trained values, their gradient and Adam's moments, counted from the
tensors; the seconds are those of the process (`time.process_time`), all clients together.

    OMP_NUM_THREADS=1 python benchmarks/nested_ranks.py
"""

import argparse
import os
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))

from fedllm.adapters.adapted_model import (
    AdaptedModel,
    load_adapted_model,
)
from fedllm.adapters.peft_model import initial_arrays
from fedllm.config import RunConfig, fedllm_home
from fedllm.config_parsing import parse_run_config
from fedllm.data.partitions import partition
from fedllm.data.rows import load_public, load_rows
from fedllm.data.tokens import tokenize
from fedllm.evaluation.held_out_loss import held_out
from fedllm.training.sft import train_adapter
from fedllm.training.task import RoundTask, training_seed

Arrays = dict[str, Any]
ARMS = {
    # Kind, whether the run's rank is the small one, and what a small client trains.
    "large": ("ffa-lora", False, "all"),
    "small": ("ffa-lora", True, "all"),
    "nested": ("ffa-lora", False, "nested"),
    "padded": ("lora", False, "padded"),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--small", type=int, default=2)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--test-rows", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; {vars(args)}")
    print("arm: test loss; CPU seconds; KB a large and a small client; MB up and down")
    for arm in args.arms:
        print(f"{arm}: {_measured(arm, args)}", flush=True)


def _measured(arm: str, args: argparse.Namespace) -> str:
    """Train one arm, and return its figures."""
    kind, is_small, how = ARMS[arm]
    config = _config(args, kind, args.small if is_small else args.rank)
    large = load_adapted_model(config, fedllm_home())
    small = large
    if how == "nested":
        small = load_adapted_model(config, fedllm_home(), rank=args.small)
    if how == "padded":
        small = load_adapted_model(_config(args, kind, args.small), fedllm_home())
    shared, shares = initial_arrays(large.spec), _shares(large, config, args)
    up = down = 0
    began = time.process_time()
    for server_round in range(1, args.rounds + 1):
        sent = []
        for number, examples in enumerate(shares):
            # Every second client is a small one.
            adapted = small if number % 2 else large
            start = _cut(shared, adapted) if how == "padded" else shared
            down += sum(value.nbytes for value in start.values())
            seed = training_seed(args.seed, server_round, number)
            task = RoundTask(start, config.train.learning_rate, seed)
            trained = train_adapter(adapted, examples, config.train, task).arrays
            up += sum(value.nbytes for value in trained.values())
            sent.append(_padded(trained, shared) if how == "padded" else trained)
        shared = {name: np.mean([one[name] for one in sent], 0) for name in shared}
    seconds = time.process_time() - began
    large.set(shared)
    loss = held_out(
        large.model, _test_rows(large, config, args), large.pad_token_id
    ).loss
    return (
        f"{loss:.3f}; {seconds:.0f}; {_kilobytes(large):.0f}, {_kilobytes(small):.0f}; "
        f"{up / 1e6:.1f}, {down / 1e6:.1f}"
    )


def _config(args: argparse.Namespace, kind: str, rank: int) -> RunConfig:
    config = parse_run_config(
        {
            "privacy.unit": "none",
            "privacy.target-epsilon": 0.0,
            "adapter.kind": kind,
            "adapter.rank": rank,
            # The same scale for every rank.
            "adapter.alpha": 2.0 * rank,
            "train.optimizer": "adamw",
            "train.local-steps": args.steps,
            "train.batch-size": args.batch,
            "train.max-length": 128,
            "train.learning-rate": args.rate,
            "train.learning-rate-min": args.rate,
        }
    )
    return replace(config, seed=args.seed)


def _shares(
    adapted: AdaptedModel, config: RunConfig, args: argparse.Namespace
) -> list[Any]:
    rows = load_rows(config.data)
    shares = []
    for number in range(args.clients):
        own = partition(config.data, rows, number, args.clients, args.seed)
        found = tokenize(own, adapted.tokenizer, config.data, config.train.max_length)
        shares.append(found.examples)
    return shares


def _test_rows(
    adapted: AdaptedModel, config: RunConfig, args: argparse.Namespace
) -> list[Any]:
    rows = load_public(config.data, "test")
    assert rows is not None
    rows = rows.select(range(args.test_rows))
    return tokenize(
        rows, adapted.tokenizer, config.data, config.train.max_length
    ).examples


def _cut(shared: Mapping[str, Any], adapted: AdaptedModel) -> Arrays:
    """Return the first rows of A and the first columns of B, as many as a client trains."""
    shapes = adapted.spec.trained_shapes
    return {name: shared[name][tuple(map(slice, shapes[name]))] for name in shared}


def _padded(trained: Mapping[str, Any], like: Mapping[str, Any]) -> Arrays:
    """Return arrays filled up with zeros to the shapes of others."""
    filled = {}
    for name, value in trained.items():
        more = [(0, b - a) for a, b in zip(value.shape, like[name].shape, strict=True)]
        filled[name] = np.pad(value, more)
    return filled


def _kilobytes(adapted: AdaptedModel) -> float:
    """Return the KB of trained and held values, the gradient and Adam's two moments."""
    held = sum(value.numel() for value in adapted.rest.values())
    trained = sum(value.numel() for value in adapted.parameters().values())
    return 4.0 * (held + 4 * trained) / 1e3


if __name__ == "__main__":
    main()
