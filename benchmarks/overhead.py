"""What federation costs beside bare training steps, and beside a naive app.

Arms, run one after the other in each repetition, medians printed:

- bare: a plain PyTorch loop over the same quantised base, adapter, batches and
  optimiser as the clients take, with torch's own attention, padded batches and the
  loss that transformers computes; one round's steps of some clients (all, or
  `--loop-clients`), scaled to all of them and to the number of rounds.
- lean: the same loop with fedllm's loss and attention, which the clients run too: what
  is left beyond it is federation alone. Its adapters are held against a client's.
- rounds: all seconds of the rounds of a real simulation, from its metrics.jsonl;
  evaluation off.
- command: the whole command of the README, start-up and evaluation included.
- naive: an app that loads, quantises and builds everything for every message
  (naive_app/); the second round of a few clients, scaled to all clients and rounds,
  and what its first round took longer, since fedllm's rounds hold their start too.
- naive-defaults: the same with the defaults of FlowerTune's example, gradient
  checkpointing and rank 32.

    python benchmarks/overhead.py
    python benchmarks/overhead.py --arms many-steps one-step --repeats 3
"""

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
NAIVE_APP = Path(__file__).parent / "naive_app"
ARMS = ("many-steps", "one-step", "command", "naive", "naive-defaults")
LOOPS = ("bare", "lean")
PACKAGES = ("flwr", "ray", "torch", "transformers", "peft", "trl", "bitsandbytes")


@dataclass(frozen=True)
class Job:
    """Work that is done bare and federated."""

    clients: int
    steps: int
    rounds: int
    overrides: dict[str, Any]

    @property
    def run_config(self) -> dict[str, Any]:
        own = {"train.local-steps": self.steps, "num-server-rounds": self.rounds}
        return own | self.overrides

    def __str__(self) -> str:
        return f"{self.clients} clients x {self.steps} steps x {self.rounds} rounds"


def main() -> None:
    args = _parser().parse_args()
    if args.bare is not None:
        print(json.dumps(bare(**json.loads(args.bare))))
        return
    _say_machine()
    smoke = {"train.batch-size": 2} if args.smoke else {}
    if args.model:
        smoke["model.name"] = args.model
    if args.rows:
        smoke |= {"data.name": args.rows}
    clients = 2 if args.smoke else 20
    repeats = 1 if args.smoke else args.repeats
    fine = [_measure(arm, clients, smoke, repeats, args) for arm in args.arms]
    sys.exit(0 if all(fine) or args.smoke else 1)


def _measure(
    arm: str, clients: int, more: dict[str, Any], repeats: int, args: Any
) -> bool:
    """Measure one arm and what it is held against; print the ratio and its bound."""
    quiet = {"strategy.evaluate-examples": 0, "privacy.noise-probe": False} | more
    many = 2 if args.smoke else 10
    if arm == "many-steps":
        job = Job(clients, many, 3, quiet)
        return _against_bare(job, rounds_seconds, 1.10, "rounds", args)
    if arm == "one-step":
        job = Job(clients, 1, 2 if args.smoke else 10, quiet)
        return _against_bare(job, rounds_seconds, 1.25, "rounds", args)
    job = Job(clients, 1, 2 if args.smoke else 5, more)
    if arm == "command":
        return _against_bare(job, command_seconds, 1.5, "whole command", args)
    naive_clients = 2 if args.smoke else args.naive_clients
    published = {"gradient-checkpointing": True, "rank": 32, "alpha": 64.0}
    own = published if arm == "naive-defaults" else {}
    ours, theirs = [], []
    job = Job(job.clients, job.steps, job.rounds, quiet)
    for _ in range(repeats):
        ours.append(rounds_seconds(job))
        theirs.append(naive_seconds(job, naive_clients, own))
    print(
        f"\n{job}: {arm} app measured on two rounds of {naive_clients} clients and "
        f"scaled linearly; all rounds, with the start of the clients' processes"
    )
    _say("fedllm", ours)
    _say("naive", theirs)
    ratio = statistics.median(theirs) / statistics.median(ours)
    return _verdict("naive / fedllm", ratio, 6.0, at_least=True)


def _against_bare(
    job: Job, measure: Any, bound: float, name: str, args: argparse.Namespace
) -> bool:
    federated, loops = [], []
    taken = min(job.clients, args.loop_clients or job.clients)
    for _ in range(1 if args.smoke else args.repeats):
        loops.append(bare_seconds(job, taken))
        federated.append(measure(job))
    print(
        f"\n{job}: {name}; the loops are one round's steps of {taken} clients, times "
        f"{job.rounds * job.clients / taken:g}"
    )
    _say("fedllm", federated)
    fine = []
    for loop in LOOPS:
        seconds = [each[loop] for each in loops]
        _say(loop, seconds)
        ratio = statistics.median(federated) / statistics.median(seconds)
        fine.append(_verdict(f"{name} / {loop}", ratio, bound, at_least=False))
    return all(fine)


def _say(name: str, seconds: list[float]) -> None:
    each = ", ".join(f"{value:.1f}" for value in seconds)
    print(f"  {name:8} median {statistics.median(seconds):8.2f} s  ({each})")


def _verdict(name: str, ratio: float, bound: float, at_least: bool) -> bool:
    fine = ratio >= bound if at_least else ratio <= bound
    sign = ">=" if at_least else "<="
    print(
        f"  {name} = {ratio:.3f}, bound {sign} {bound:g}: {'PASS' if fine else 'FAIL'}",
        flush=True,
    )
    return fine


def _say_machine() -> None:
    model = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    print(
        f"machine: {model[1] if model else platform.processor()}, {os.cpu_count()} "
        f"cores, {os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f}"
        f" GiB, load {os.getloadavg()[0]:.1f}; {_threads()} threads a client"
    )
    names = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    print(f"Python {platform.python_version()}, {names}", flush=True)


def _threads() -> int:
    """Threads of a virtual client: Ray gives its actor as many as it has CPUs."""
    told = os.environ.get("OMP_NUM_THREADS")
    return int(told) if told else min(2, os.cpu_count() or 1)


# --- federated ------------------------------------------------------------------------


def simulate(
    app: Path, clients: int, run_config: dict[str, Any], home: Path | None = None
) -> tuple[float, str]:
    """Run the README's command; return its seconds and output."""
    command = [sys.executable, "-m", "fedllm.commands.simulate", str(app)]
    command += ["--num-supernodes", str(clients)]
    if run_config:
        values = " ".join(f"{k}={json.dumps(v)}" for k, v in run_config.items())
        command += ["--run-config", values]
    env = dict(os.environ)
    env["PYTHONPATH"] = f"{ROOT}{os.pathsep}{env.get('PYTHONPATH', '')}"
    started = time.monotonic()
    done = subprocess.run(
        command, cwd=ROOT, env=env, capture_output=True, text=True, check=False
    )
    seconds = time.monotonic() - started
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stdout[-4000:]}{done.stderr}")
    return seconds, done.stdout


def rounds_seconds(job: Job) -> float:
    """All seconds of all rounds of a simulation."""
    _, output = simulate(ROOT, job.clients, job.run_config)
    found = re.search(r"run folder: (\S+)", output)
    if found is None:
        sys.exit(f"no run folder in:\n{output[-2000:]}")
    text = (Path(found[1]) / "metrics.jsonl").read_text("utf-8")
    lines = [json.loads(line) for line in text.splitlines()]
    for line in lines[1:]:
        if line["clients_answered"] != job.clients or line["clients_rejected"]:
            sys.exit(f"not every client trained: {line}")
    return sum(sum(line["seconds"].values()) for line in lines[1:])


def command_seconds(job: Job) -> float:
    return simulate(ROOT, job.clients, job.run_config)[0]


def naive_seconds(job: Job, clients: int, own: dict[str, Any]) -> float:
    """One warm round of a few clients of the naive app, scaled to the job."""
    config = _resolved(job.run_config)
    from fedllm.config import fedllm_home
    from fedllm.data.embedded import BUILT_IN_DATA
    from fedllm.models.location import locate

    rows = config.data.name
    if rows == BUILT_IN_DATA.name:
        shards = sorted(BUILT_IN_DATA.folder.glob("train-*.jsonl"))
        rows = ",".join(str(path) for path in shards)
    told = {
        "model": locate(config.model.name, fedllm_home()),
        "rows": rows,
        "batch-size": config.train.batch_size,
        "local-steps": job.steps,
        "num-server-rounds": 2,
    } | own
    _, output = simulate(NAIVE_APP, clients, told)
    found = re.search(r"naive rounds took ([\d.]+) and ([\d.]+) s", output)
    if found is None:
        sys.exit(f"the naive app failed:\n{output[-4000:]}")
    cold, warm = float(found[1]), float(found[2])
    return warm / clients * job.clients * job.rounds + cold - warm


# --- bare -----------------------------------------------------------------------------


def bare_seconds(job: Job, taken: int) -> dict[str, float]:
    """Seconds of the job's steps by each loop, in a process of its own.

    Args:
        job: The work.
        taken: How many clients' steps are taken; the seconds are scaled to all.
    """
    told = {
        "clients": job.clients,
        "taken": taken,
        "rounds": job.rounds,
        "run_config": job.run_config,
    }
    env = os.environ | {"OMP_NUM_THREADS": str(_threads())}
    env["PYTHONPATH"] = f"{ROOT}{os.pathsep}{env.get('PYTHONPATH', '')}"
    done = subprocess.run(
        [sys.executable, __file__, "--bare", json.dumps(told)],
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        sys.exit(f"the bare loop failed:\n{done.stderr[-4000:]}")
    result = json.loads(done.stdout.splitlines()[-1])
    # The same work is claimed, so it is held against the client's own training.
    # Roundings add up over the steps: 0.05 after one, 0.12 after ten.
    if result["difference"] > 1e-4 or result["rounding"] > 0.2:
        sys.exit(f"the loops do not do what a client does: {result}")
    return {loop: float(result[loop]) for loop in LOOPS}


def bare(
    clients: int, taken: int, rounds: int, run_config: dict[str, Any]
) -> dict[str, float]:
    """Take one round's steps of some clients; scale the seconds to all and all rounds.

    Returns:
        Seconds of both loops. `difference` is the distance of client 0's update from
        the one that fedllm's own training makes of the same seed, by the lean loop;
        `rounding` that of the bare loop, whose kernels round bfloat16 elsewhere. Both
        are relative to the update's norm.
    """
    import numpy as np
    import torch

    from fedllm.adapters.adapted_model import load_adapted_model
    from fedllm.adapters.peft_model import get_trained, initial_arrays
    from fedllm.config import fedllm_home
    from fedllm.data.partitions import partition
    from fedllm.data.rows import load_rows
    from fedllm.data.tokens import tokenize
    from fedllm.training.sft import train_adapter
    from fedllm.training.task import RoundTask, training_seed

    config = _resolved(run_config)
    if config.adapter.kind == "auto" or config.train.optimizer != "sgd":
        sys.exit("the bare loop knows a fixed kind of adapter and plain SGD")
    torch.set_num_threads(_threads())
    adapted = load_adapted_model(config, fedllm_home())
    model, spec = adapted.model, adapted.spec
    rows = load_rows(config.data, None)
    examples = [
        tokenize(
            partition(config.data, rows, index, clients, config.seed),
            adapted.tokenizer,
            config.data,
            config.train.max_length,
        ).examples
        for index in range(taken)
    ]
    initial = initial_arrays(spec)
    seeds = [training_seed(config.seed, 1, index) for index in range(taken)]
    rate = config.train.learning_rate

    def trained_by_client() -> dict[str, Any]:
        task = RoundTask(initial, rate, seeds[0])
        return train_adapter(adapted, examples[0], config.train, task).arrays

    pad = adapted.pad_token_id
    wanted = trained_by_client()  # also warms up what is compiled at first use
    client_attention = model.config._attn_implementation
    seconds = dict.fromkeys(LOOPS, 0.0)
    first: dict[str, dict[str, Any]] = {}
    for loop in LOOPS:
        model.set_attn_implementation("sdpa" if loop == "bare" else client_attention)
        for index in range(taken):
            mine = (examples[index], config, pad, seeds[index])
            seconds[loop] += _steps(loop, model, spec, initial, *mine)
            first.setdefault(loop, get_trained(model, spec))

    def off(loop: str) -> float:
        gap = sum(np.square(first[loop][k] - wanted[k]).sum() for k in wanted)
        moved = sum(np.square(wanted[k] - initial[k]).sum() for k in wanted)
        return float(np.sqrt(gap / max(moved, 1e-30)))

    return {
        **{loop: each / taken * clients * rounds for loop, each in seconds.items()},
        "difference": off("lean"),
        "rounding": off("bare"),
    }


def _steps(
    loop: str,
    model: Any,
    spec: Any,
    initial: Any,
    examples: list[Any],
    config: Any,
    pad: int,
    seed: int,
) -> float:
    """Take one client's steps by one of the loops; return their seconds."""
    import torch

    from fedllm.adapters.peft_model import set_trained
    from fedllm.models.answer_loss import answer_losses, collate

    set_trained(model, spec, initial)
    model.train()
    device = next(model.parameters()).device
    parameters = [p for p in model.parameters() if p.requires_grad]
    # LoRA's parameters come as the base's type; the client trains them in float32.
    for parameter in parameters:
        parameter.data = parameter.data.float()
    set_trained(model, spec, initial)
    if device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    optimizer = torch.optim.SGD(parameters, lr=config.train.learning_rate)
    for batch in _batches(
        len(examples), config.train.batch_size, config.train.local_steps, seed
    ):
        inputs = collate([examples[index] for index in batch], pad)
        inputs = {name: value.to(device) for name, value in inputs.items()}
        if loop == "bare":
            model(**inputs).loss.backward()
        else:
            answer_losses(model, **inputs).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def _batches(count: int, size: int, steps: int, seed: int) -> Iterator[list[int]]:
    """Yield the indices that the trainer draws with this seed."""
    import torch

    epoch = 0
    while steps > 0:
        generator = torch.Generator().manual_seed(seed + epoch)
        order = torch.randperm(count, generator=generator).tolist()
        for start in range(0, count, size):
            if steps > 0:
                yield order[start : start + size]
            steps -= 1
        epoch += 1


def _resolved(overrides: dict[str, Any]) -> Any:
    from flwr.common.config import flatten_dict

    from fedllm.config_parsing import parse_run_config

    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    defaults = flatten_dict(project["tool"]["flwr"]["app"]["config"])
    return parse_run_config({**defaults, **overrides})


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--naive-clients", type=int, default=4, metavar="N")
    parser.add_argument(
        "--loop-clients", type=int, metavar="N", help="clients that the loops take"
    )
    parser.add_argument("--smoke", action="store_true", help="small, once, no verdict")
    parser.add_argument("--model", help="model.name of all arms")
    parser.add_argument("--rows", help="data.name of all arms")
    parser.add_argument("--bare", help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    main()
