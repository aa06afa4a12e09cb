"""Measure record-level privacy on SmolLM2 and wordnet-medical.

    core="--kind lora-core --optimizer adamw --lr 0.05 --norm 0.5 --test"
    python benchmarks/record_level.py gain $core --batch 128 --steps 10 [--twin]
    python benchmarks/record_level.py gain $core --clients 10 --batch 32 --steps 2 \
        --rounds 2 [--twin]
    python benchmarks/record_level.py overhead --batch 64

`gain` runs the clients' DP-SGD as the app does (its own noise, Poisson batches and
calibration), beside the same steps without clipping and noise (`--twin`), and averages
the adapters after each round. Each line is a JSON object and is appended to `--out`; a
line that is there already is not measured again. Learning rate and norm are chosen by
the public validation rows; the loss that counts is that of the test rows.

`overhead` times one step of ordinary SFT and one of DP-SGD on the same examples, each in
a process of its own, and takes the largest resident memory.
"""

import argparse
import json
import multiprocessing
import random
import resource
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from fedllm.adapters.adapted_model import load_adapted_model
from fedllm.adapters.peft_model import initial_arrays
from fedllm.config import (
    AdapterConfig,
    DataConfig,
    ModelConfig,
    PrivacyConfig,
    RunConfig,
    TrainConfig,
    fedllm_home,
)
from fedllm.data.partitions import partition
from fedllm.data.rows import load_public, load_rows
from fedllm.data.tokens import tokenize
from fedllm.evaluation.held_out_loss import held_out
from fedllm.privacy.record_ledger import RecordPlan, make_plan
from fedllm.training.dp_sgd import train_privately
from fedllm.training.task import RoundTask


class Bench:
    """The base with an adapter, the clients' examples and the public rows."""

    def __init__(self, args: argparse.Namespace) -> None:
        adapter = AdapterConfig(
            kind=args.kind, rank=args.rank, target_modules=args.target_modules
        )
        base = ModelConfig(quantization=args.quantization)
        config = RunConfig(model=base, adapter=adapter, seed=args.seed)
        self.adapted = load_adapted_model(config, fedllm_home())
        data = DataConfig()
        rows = load_rows(data)
        self.clients = [
            self.tokens(partition(data, rows, index, args.clients, args.seed))
            for index in range(args.clients)
        ]
        validation = load_public(data, "validation")
        assert validation is not None
        self.validation = self.tokens(validation.shuffle(seed=42).select(range(128)))
        self.test = self.tokens(load_public(data, "test"))

    def tokens(self, rows: Any) -> list[dict[str, Any]]:
        return tokenize(rows, self.adapted.tokenizer, DataConfig(), 512).examples

    def loss(self, arrays: Any, examples: Any) -> float:
        adapted = self.adapted
        adapted.set(arrays)
        return held_out(adapted.model, examples, adapted.pad_token_id).loss


def client_round(
    bench: Bench, args: argparse.Namespace, examples: Any, arrays: Any, plan: RecordPlan
) -> Any:
    train = TrainConfig(
        batch_size=args.micro_batch, optimizer=args.optimizer, learning_rate=args.lr
    )
    config = RunConfig(train=train, privacy=PrivacyConfig(max_grad_norm=args.norm))
    task = RoundTask(arrays, args.lr)
    return train_privately(bench.adapted, examples, config, plan, task).arrays


def plan_of(args: argparse.Namespace, num_records: int) -> RecordPlan:
    plan = make_plan(
        num_records, args.batch, args.steps, args.rounds, args.epsilon, 0.0, args.delta
    )
    if not args.twin:
        return plan
    # A norm so large that nothing is clipped and noise that is not seen beside it.
    return RecordPlan(
        1e-12, plan.sampling_probability, plan.steps, args.batch, args.delta
    )


def gain(args: argparse.Namespace) -> None:
    if args.twin:
        args.norm = 1e3
    row = {k: v for k, v in vars(args).items() if k not in ("out", "command")}
    if args.out.exists() and any(
        row.items() <= json.loads(line).items()
        for line in args.out.read_text().splitlines()
    ):
        return
    bench = Bench(args)
    arrays = initial_arrays(bench.adapted.spec)
    base = bench.loss(arrays, bench.validation)
    plans = [plan_of(args, len(examples)) for examples in bench.clients]
    validation, began = [round(base, 4)], time.monotonic()
    for _ in range(args.rounds):
        made = [
            client_round(bench, args, examples, arrays, plan)
            for examples, plan in zip(bench.clients, plans, strict=True)
        ]
        arrays = {k: np.mean([m[k] for m in made], axis=0) for k in arrays}
        validation.append(round(bench.loss(arrays, bench.validation), 4))
        sys.stderr.write(f"{time.monotonic() - began:.0f} s {validation}\n")
    row |= {"z": plans[0].noise_multiplier, "validation": validation}
    if args.test:
        row["test_before"] = bench.loss(initial_arrays(bench.adapted.spec), bench.test)
        row["test_after"] = bench.loss(arrays, bench.test)
    row["seconds"] = round(time.monotonic() - began)
    line = json.dumps(row)
    sys.stdout.write(line + "\n")
    with args.out.open("a") as file:
        file.write(line + "\n")


def overhead(args: argparse.Namespace) -> None:
    # A new process each: memory that was once used is not given back.
    context = multiprocessing.get_context("spawn")
    measured = {}
    for way in ("sft", "record"):
        with context.Pool(1) as pool:
            measured[way] = pool.apply(one_step, (args, way))
    (sft, sft_peak), (record, record_peak) = measured["sft"], measured["record"]
    answer = {
        **{k: v for k, v in vars(args).items() if k not in ("out", "command")},
        "sft_seconds": sft,
        "record_seconds": record,
        "time_ratio": record / sft,
        "sft_peak_mb": sft_peak,
        "record_peak_mb": record_peak,
        "memory_ratio": record_peak / sft_peak,
    }
    sys.stdout.write(json.dumps(answer) + "\n")


def one_step(args: argparse.Namespace, way: str) -> tuple[float, float]:
    """Return seconds and peak megabytes of one step on the same `batch` examples."""
    from fedllm.training.sft import train_adapter

    bench = Bench(args)
    examples = random.Random(0).sample(bench.clients[0], args.batch)
    task = RoundTask(initial_arrays(bench.adapted.spec), 1.0)
    config = TrainConfig(
        batch_size=args.micro_batch,
        gradient_accumulation=args.batch // args.micro_batch,
        local_steps=1,
        learning_rate=args.lr,
    )

    def run(rows: Any, settings: TrainConfig) -> float:
        began = time.monotonic()
        if way == "sft":
            train_adapter(bench.adapted, rows, settings, task)
        else:
            # Probability 1: the batch is the examples, as for SFT.
            plan = RecordPlan(1.0, 1.0, 1, len(rows), 1e-5)
            privacy = PrivacyConfig(max_grad_norm=1.0)
            config = RunConfig(train=settings, privacy=privacy)
            train_privately(bench.adapted, rows, config, plan, task)
        return time.monotonic() - began

    warm = TrainConfig(batch_size=args.micro_batch, local_steps=1)
    run(examples[: args.micro_batch], warm)
    seconds = run(examples, config)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return seconds, peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("command", choices=("gain", "overhead"))
    parser.add_argument("--clients", type=int, default=1)
    parser.add_argument("--kind", default="ffa-lora")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--target-modules", default="q_proj,v_proj")
    parser.add_argument("--quantization", type=int, default=0)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--micro-batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--optimizer", default="sgd")
    parser.add_argument("--lr", type=float, default=1.0)
    parser.add_argument("--norm", type=float, default=1.0)
    parser.add_argument("--epsilon", type=float, default=8.0)
    parser.add_argument("--delta", type=float, default=1e-5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--twin", action="store_true")
    parser.add_argument("--test", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("record_level.jsonl"))
    args = parser.parse_args()
    {"gain": gain, "overhead": overhead}[args.command](args)


if __name__ == "__main__":
    main()
