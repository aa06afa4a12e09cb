"""Screen settings of one noise for all clients' rows, in one process.

`--sampled` rows of all clients stand in for a batch of B at each step, with the noise of B:
their mean is a noisier estimate than B rows would give, so a real run does no worse in the
mean. Gradients are the project's own (`PerExample`), the step and its schedule are the
server's. Noise comes from a seeded generator, so that a row can be made again; a run of
fedllm never does that, and nothing here is private. Validation rows choose; test rows are
scored once, at the end.

    python benchmarks/joint_screen.py --run-config configs/record-joint.toml
    python benchmarks/joint_screen.py --run-config configs/record-joint.toml \
        num-server-rounds=48 strategy.server-learning-rate=3.0

Appends a line to `--out`, and skips what that file has.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedllm.adapters.adapted_model import AdaptedModel, load_adapted_model
from fedllm.adapters.peft_model import initial_arrays
from fedllm.commands.options import read_run_config
from fedllm.config import RunConfig, fedllm_home
from fedllm.data.rows import load_rows
from fedllm.data.tokens import Example, tokenize
from fedllm.evaluation.public_rows import PublicRows
from fedllm.planning.joint_noise import joint_settings
from fedllm.strategy.server_optimizer import cosine
from fedllm.training.dp_sgd import ready_for_gradients
from fedllm.training.per_example_gradients import PerExample
from fedllm.training.task import RoundTask

_EVERY = 20


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run-config", nargs="+", required=True)
    parser.add_argument("--sampled", type=int, default=16, help="rows of a step")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("joint_screen.jsonl"))
    args = parser.parse_args()
    config = read_run_config(args.run_config)
    key = {
        "run_config": sorted(map(str, args.run_config)),
        "sampled": args.sampled,
        "seed": args.seed,
    }
    done = args.out.read_text().splitlines() if args.out.exists() else []
    if any(json.loads(line)["key"] == key for line in done):
        print(f"{args.out.resolve()} has this one")
        return
    row = {"key": key, **_screened(config, args.sampled, args.seed)}
    with args.out.open("a") as file:
        file.write(json.dumps(row) + "\n")
    print(f"test loss {row['test_loss']:.4f}; written to {args.out.resolve()}")


def _screened(config: RunConfig, sampled: int, seed: int) -> dict[str, Any]:
    """Take all steps; return the losses."""
    torch.manual_seed(seed)
    adapted = load_adapted_model(config, fedllm_home())
    rows, public = _rows(adapted, config), PublicRows(config, fedllm_home(), adapted)
    size, steps = adapted.spec.num_trainable, config.num_server_rounds
    settings = joint_settings(config, [len(rows)], size)
    batch, norm = settings.expected_batch_size, settings.max_grad_norm
    print(f"{size} values, B {batch}, z {settings.noise_multiplier:.4f}", flush=True)
    generator, began = np.random.default_rng(seed), time.monotonic()
    arrays, curve = initial_arrays(adapted.spec), []
    for step in range(1, steps + 1):
        drawn = [rows[i] for i in generator.choice(len(rows), sampled, replace=False)]
        gradient = _mean_clipped(adapted, drawn, config, arrays, seed)
        noise = generator.standard_normal(size) * settings.noise_multiplier * norm
        change = -_rate(config, step) * (gradient + noise / batch)
        arrays = _moved(adapted, arrays, change)
        if step % _EVERY == 0 or step == steps:
            curve.append((step, public.validation_loss(arrays)))
            seconds = time.monotonic() - began
            print(
                f"step {step}/{steps}: {curve[-1][1]:.4f}, {seconds:.0f} s", flush=True
            )
    score = public.test_loss(arrays)
    assert score is not None
    return {"validation_losses": curve, "test_loss": score.loss}


def _rows(adapted: AdaptedModel, config: RunConfig) -> list[Example]:
    tokenized = tokenize(
        load_rows(config.data), adapted.tokenizer, config.data, config.train.max_length
    )
    return tokenized.examples


def _rate(config: RunConfig, step: int) -> float:
    strategy = config.strategy
    first, last = strategy.server_learning_rate, strategy.server_learning_rate_min
    return cosine(first, last, step, config.num_server_rounds)


def _mean_clipped(
    adapted: AdaptedModel,
    drawn: list[Example],
    config: RunConfig,
    arrays: dict[str, Any],
    seed: int,
) -> np.ndarray[Any, Any]:
    """Return the mean of the clipped gradients, (d,)."""
    total = np.zeros(adapted.spec.num_trainable)
    with ready_for_gradients(adapted, config, RoundTask(arrays, 1.0, seed)):
        per_example = PerExample(adapted.model, adapted.pad_token_id)
        for part in per_example.gradients(drawn, config.train.batch_size):
            for one in part.numpy().astype(np.float64):
                length = float(np.linalg.norm(one))
                total += one * min(1.0, config.privacy.max_grad_norm / length)
    return total / len(drawn)


def _moved(
    adapted: AdaptedModel, arrays: dict[str, Any], change: np.ndarray[Any, Any]
) -> dict[str, Any]:
    """Return the arrays after a change, whose values are in the model's order."""
    names = {id(p): name for name, p in adapted.parameters().items()}
    moved, start = {}, 0
    for parameter in adapted.model.parameters():
        if not parameter.requires_grad:
            continue
        name = names[id(parameter)]
        part = change[start : start + parameter.numel()].reshape(arrays[name].shape)
        moved[name] = (arrays[name] + part).astype(np.float32)
        start += parameter.numel()
    return moved


if __name__ == "__main__":
    main()
