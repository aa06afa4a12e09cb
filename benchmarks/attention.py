"""Seconds and exactness of a client's step on a CPU: attention, no padding, sharing.

    python benchmarks/attention.py

The README's client (`train_adapter`, SmolLM2 in 4 bit, one step of 8 rows) by turns with
torch's attention, with gradients in float32 (attention.py), with those and without
padding, and with what all rows begin with computed once, too (packing.py); on one thread
and on two. The distance of each one's update from that of a copy
of the model that computes in float32, relative to the update's norm, says what the
lever does to the result: bfloat16 alone makes the first figure.
"""

import argparse
import copy
import gc
import os
import statistics
import time
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from overhead import _resolved, _say_machine

from fedllm.adapters.adapted_model import load_adapted_model
from fedllm.adapters.peft_model import initial_arrays
from fedllm.config import fedllm_home
from fedllm.data.partitions import partition
from fedllm.data.rows import load_rows
from fedllm.data.tokens import tokenize
from fedllm.models import attention, packing
from fedllm.training.sft import train_adapter
from fedllm.training.task import RoundTask, training_seed

# Which attention, which models are computed without padding, and whether they share.
SETTINGS: dict[str, tuple[str, tuple[str, ...], bool]] = {
    "torch's attention": ("sdpa", (), False),
    "gradients": (attention.NAME, (), False),
    "and no padding": (attention.NAME, packing.MODEL_TYPES, False),
    "and shared once": (attention.NAME, packing.MODEL_TYPES, True),
}
CLIENTS = 3
RATIO_BOUND, DISTANCE_BOUND = 0.7, 1.1


def main() -> None:
    """Print each setting's seconds and distance, and whether they are within bounds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    _say_machine()
    client = Client()
    exact = copy.deepcopy(client.adapted)
    for module in exact.model.float().modules():
        if hasattr(module, "compute_dtype"):
            module.compute_dtype = torch.float32
    references = [client.update(exact, "sdpa", (), False, i)[1] for i in range(CLIENTS)]
    # As a client does: else each trainer that is built walks all that imports left.
    gc.collect()
    gc.freeze()
    fine = True
    for threads in sorted({1, os.cpu_count() or 1}):
        torch.set_num_threads(threads)
        seconds: dict[str, list[float]] = {name: [] for name in SETTINGS}
        distance: dict[str, float] = {}
        for _ in range(args.repeats):
            for name, setting in SETTINGS.items():
                made = [
                    client.update(client.adapted, *setting, i) for i in range(CLIENTS)
                ]
                seconds[name].append(sum(took for took, _ in made) / CLIENTS)
                distance[name] = statistics.mean(
                    float(np.linalg.norm(update - exactly) / np.linalg.norm(exactly))
                    for (_, update), exactly in zip(made, references, strict=True)
                )
        first = next(iter(SETTINGS))
        for name in SETTINGS:
            took, ratio = statistics.median(seconds[name]), 1.0
            ratio = took / statistics.median(seconds[first])
            print(
                f"{threads} threads, {name:18} {took:6.3f} s a client, ratio {ratio:.2f},"
                f" distance from float32 {distance[name]:.4f}"
            )
        fine &= ratio <= RATIO_BOUND
        fine &= distance[name] <= DISTANCE_BOUND * distance[first]
    print(
        f"bounds: ratio {RATIO_BOUND}, distance {DISTANCE_BOUND} times that of "
        f"{first}: {'PASS' if fine else 'FAIL'}"
    )
    raise SystemExit(not fine)


class Client:
    """The README's base, adapter and the partitions of a few of its clients."""

    def __init__(self) -> None:
        self.config = _resolved({})
        self.adapted = load_adapted_model(self.config, fedllm_home(), "cpu")
        rows = load_rows(self.config.data, None)
        self.examples = []
        for index in range(CLIENTS):
            mine = partition(self.config.data, rows, index, 20, self.config.seed)
            tokenized = tokenize(mine, self.adapted.tokenizer, self.config.data, 512)
            self.examples.append(tokenized.examples)
        self.initial = initial_arrays(self.adapted.spec)

    def update(
        self, adapted: Any, kind: str, packed: tuple[str, ...], share: bool, index: int
    ) -> tuple[float, Any]:
        """Return the seconds of one client's training, and its update as a vector."""
        adapted.model.set_attn_implementation(kind)
        seed = training_seed(self.config.seed, 1, index)
        task = RoundTask(self.initial, self.config.train.learning_rate, seed)
        found = packing._num_shared if share else lambda *_: 0
        with (
            patch.object(packing, "MODEL_TYPES", packed),
            patch.object(packing, "_num_shared", found),
        ):
            began = time.perf_counter()
            arrays = train_adapter(
                adapted, self.examples[index], self.config.train, task
            ).arrays
            took = time.perf_counter() - began
        moved = [(arrays[k] - self.initial[k]).ravel() for k in sorted(arrays)]
        return took, np.concatenate(moved)


if __name__ == "__main__":
    main()
