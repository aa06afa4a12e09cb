"""Measure settings of a private federation of SmolLM2 on wordnet-medical.

Every client takes its local steps from the same adapter through fedllm's own trainer;
clipping, noise and the server's step are then tried in memory, so that one pass over
the clients serves many settings of the first round. Noise comes from a seeded
generator, so that a table can be made again; a run of fedllm never does that.

    python benchmarks/choose_defaults.py screen --kind ffa-lora --seed 0
    python benchmarks/choose_defaults.py rounds --kind ffa-lora --seed 0 \
        --clip 0.3 --server-lr 2 --rounds 3

`screen` prints the validation loss after round 1 for a grid of clip (as a share of the
median update norm) and step (server learning rate times clip). `rounds` runs a whole
federation. Each line is a JSON object; validation rows choose, so test rows are not
looked at but in the last line of `rounds`.
"""

import argparse
import json
import sys
import time
from typing import Any

import numpy as np

from fedllm.adapters.adapted_model import load_adapted_model
from fedllm.adapters.peft_model import initial_arrays
from fedllm.config import (
    AdapterConfig,
    DataConfig,
    ModelConfig,
    RunConfig,
    TrainConfig,
    fedllm_home,
)
from fedllm.data.partitions import partition
from fedllm.data.rows import load_public, load_rows
from fedllm.data.tokens import tokenize
from fedllm.evaluation.held_out_loss import held_out
from fedllm.privacy.accounting import calibrate
from fedllm.strategy.server_optimizer import cosine
from fedllm.training.sft import train_adapter
from fedllm.training.task import RoundTask, training_seed


class Bench:
    """The base with an adapter, the clients' examples and the public rows."""

    def __init__(self, args: argparse.Namespace) -> None:
        adapter = AdapterConfig(
            kind=args.kind, rank=args.rank, target_modules=args.target_modules
        )
        self.args = args
        base = ModelConfig(quantization=args.quantization)
        config = RunConfig(model=base, adapter=adapter, seed=args.seed)
        self.adapted = load_adapted_model(config, fedllm_home())
        self.spec, tokenizer = self.adapted.spec, self.adapted.tokenizer
        self.train = TrainConfig(
            batch_size=args.batch_size,
            local_steps=args.local_steps,
            learning_rate=args.lr,
            learning_rate_min=0.0,
        )
        data = DataConfig(partition=args.partition)
        rows = load_rows(data)
        self.clients = []
        for index in range(args.clients):
            part = partition(data, rows, index, args.clients, args.seed)
            self.clients.append(tokenize(part, tokenizer, data, 512).examples)
        public = load_public(data, "validation").shuffle(seed=42).select(range(128))
        self.validation = tokenize(public, tokenizer, data, 512).examples
        test = load_public(data, "test")
        self.test = tokenize(test, tokenizer, data, 512).examples

    def updates(self, arrays: dict[str, Any], server_round: int, lr: float) -> Any:
        """Return (clients, d) updates of one round."""
        start = flatten(arrays)
        out = []
        for index, examples in enumerate(self.clients):
            seed = training_seed(self.args.seed, server_round, index)
            task = RoundTask(arrays, lr, seed)
            trained = train_adapter(self.adapted, examples, self.train, task)
            out.append(flatten(trained.arrays) - start)
        return np.stack(out)

    def loss(self, vector: Any, examples: Any) -> float:
        adapted = self.adapted
        adapted.set(self.unflatten(vector))
        return held_out(adapted.model, examples, adapted.pad_token_id).loss

    def unflatten(self, vector: Any) -> dict[str, Any]:
        arrays, start = {}, 0
        for name, shape in self.spec.trained_shapes.items():
            size = int(np.prod(shape))
            arrays[name] = (
                vector[start : start + size].reshape(shape).astype(np.float32)
            )
            start += size
        return arrays


def flatten(arrays: dict[str, Any]) -> Any:
    return np.concatenate([np.asarray(a, np.float64).ravel() for a in arrays.values()])


def clipped_mean(updates: Any, clip: float) -> Any:
    norms = np.linalg.norm(updates, axis=1, keepdims=True)
    return (updates * np.minimum(1.0, clip / np.maximum(norms, 1e-300))).mean(0)


def tell(**row: Any) -> None:
    sys.stdout.write(json.dumps(row) + "\n")
    sys.stdout.flush()


def screen(bench: Bench, args: argparse.Namespace) -> None:
    start = initial_arrays(bench.spec)
    origin = flatten(start)
    began = time.monotonic()
    updates = bench.updates(start, 1, args.lr)
    median = float(np.median(np.linalg.norm(updates, axis=1)))
    z = calibrate(args.epsilon, args.rounds, 1e-5, "all", 1.0)
    generator = np.random.default_rng(args.seed + 1000)
    noise = generator.standard_normal(origin.size) * z / args.clients
    tell(
        d=origin.size,
        median_norm=median,
        z=z,
        base=bench.loss(origin, bench.validation),
        seconds=time.monotonic() - began,
    )
    for share in args.shares:
        mean = clipped_mean(updates, share * median) / (share * median)
        for step in args.steps:
            scale = step
            loss = bench.loss(origin + scale * (mean + noise), bench.validation)
            quiet = bench.loss(origin + scale * mean, bench.validation)
            tell(
                clip_share=share,
                step=step,
                cohesion=float(np.linalg.norm(mean)),
                loss=loss,
                without_noise=quiet,
            )


def rounds(bench: Bench, args: argparse.Namespace) -> None:
    z = calibrate(args.epsilon, args.rounds, 1e-5, "all", 1.0) if args.epsilon else 0.0
    generator = np.random.default_rng(args.seed + 1000)
    vector = flatten(initial_arrays(bench.spec))
    momentum = np.zeros_like(vector)
    losses = [bench.loss(vector, bench.validation)]
    first_test = bench.loss(vector, bench.test)
    began = time.monotonic()
    for server_round in range(1, args.rounds + 1):
        lr = cosine(args.lr, args.lr, server_round, args.rounds)
        updates = bench.updates(bench.unflatten(vector), server_round, lr)
        noise = generator.standard_normal(vector.size) * z * args.clip / args.clients
        mean = clipped_mean(updates, args.clip) + noise
        momentum = args.momentum * momentum + mean
        rate = cosine(args.server_lr, args.server_lr_min, server_round, args.rounds)
        vector = vector + rate * momentum
        losses.append(bench.loss(vector, bench.validation))
        norms = np.linalg.norm(updates, axis=1)
        tell(round=server_round, loss=losses[-1], median_norm=float(np.median(norms)))
    tell(
        **{k: v for k, v in vars(args).items() if k not in ("shares", "steps")},
        z=z,
        validation=losses,
        test_before=first_test,
        test_after=bench.loss(vector, bench.test),
        seconds=time.monotonic() - began,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("mode", choices=("screen", "rounds"))
    parser.add_argument("--kind", default="ffa-lora")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--target-modules", default="auto")
    parser.add_argument("--quantization", type=int, default=4)
    parser.add_argument("--clients", type=int, default=20)
    parser.add_argument("--partition", default="iid")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--local-steps", type=int, default=1)
    parser.add_argument("--lr", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--epsilon", type=float, default=8.0)
    parser.add_argument("--clip", type=float, default=1.0)
    parser.add_argument("--server-lr", type=float, default=1.0)
    parser.add_argument("--server-lr-min", type=float, default=None)
    parser.add_argument("--momentum", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shares", type=float, nargs="+", default=[0.25, 1.0])
    parser.add_argument(
        "--steps", type=float, nargs="+", default=[0.2, 0.4, 0.8, 1.6, 3.2, 6.4]
    )
    args = parser.parse_args()
    if args.server_lr_min is None:
        args.server_lr_min = args.server_lr
    bench = Bench(args)
    (screen if args.mode == "screen" else rounds)(bench, args)


if __name__ == "__main__":
    main()
