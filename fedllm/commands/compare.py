"""Does federation help? The same data, rounds and settings, trained five ways.

    python -m fedllm.commands.compare --run-config configs/private-20.toml --seed 0 1 2

Arms: the base model; each client alone; all data in one place; federated without DP;
federated with the DP that the config asks for. All go through fedllm's own client and
strategy, in this process and on one resident base model. Every arm that is finished is
kept in the output folder: the same command goes on where it was stopped.

This needs all clients' data in one place, so it is for simulations on public data. Arms
without DP are private in no way, and nobody promises anything for the table as a whole.
"""

import argparse
import json
import logging
import re
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedllm.atomic_files import write_atomic
from fedllm.commands.comparison_arms import ARMS, arm_names
from fedllm.commands.options import read_config
from fedllm.config import RunConfig, fedllm_home, flat
from fedllm.errors import ConfigError, FedllmError
from fedllm.reporting.comparison import BUDGET, write_comparison


def main(arguments: list[str] | None = None) -> None:
    """Run the command; an error is one line and exit status 1."""
    args = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    try:
        _run(args)
    except FedllmError as error:
        sys.exit(f"{type(error).__name__}: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped: the same command goes on with the arms that are missing")


def _run(args: argparse.Namespace) -> None:
    config = read_config(Path(args.run_config))
    name = f"compare-{Path(args.run_config).stem}-{args.num_clients}"
    out = Path(args.out) if args.out else fedllm_home() / "runs" / name
    out.mkdir(parents=True, exist_ok=True)
    setting = {
        "run_config": {k: v for k, v in flat(config).items() if k != "seed"},
        "num_clients": args.num_clients,
        "benchmark": args.benchmark,
    }
    _keep_setting(out / "setting.json", setting)
    todo = list(_missing(args, config, out))
    began = time.monotonic()
    for done, row in enumerate(_measured(args, config, out, todo), start=1):
        left = (time.monotonic() - began) / done * (len(todo) - done)
        sys.stdout.write(
            f"seed {row['seed']}, {row['arm']}: test loss {row['test_loss']:.3f}; "
            f"{len(todo) - done} left, about {left / 60:.0f} min\n"
        )
        sys.stdout.flush()
    rows = [json.loads(p.read_text("utf-8")) for p in sorted(out.glob("seed-*/*.json"))]
    rows = [row for row in rows if "arm" in row]
    sys.stdout.write(write_comparison(out, setting, rows) + f"\n{out}\n")


def _missing(
    args: argparse.Namespace, config: RunConfig, out: Path
) -> Iterator[tuple[int, str]]:
    """Yield the seed and the name of each arm that is asked for and not there yet."""
    for seed in args.seed or [config.seed]:
        for arm in arm_names(config, args.num_clients, args.alone):
            is_asked = re.sub(r"-\d+$", "", arm) in args.arms
            if is_asked and not _result(out, seed, arm).exists():
                yield seed, arm


def _measured(
    args: argparse.Namespace,
    config: RunConfig,
    out: Path,
    todo: Sequence[tuple[int, str]],
) -> Iterator[dict[str, Any]]:
    """Train the arms, write each one's row, and yield it."""
    # The advice of a run is on that run alone; an arm's outcome is its row.
    logging.getLogger("fedllm.server.summary").setLevel(logging.ERROR)
    bench: Any = None
    for seed, arm in todo:
        if bench is None or bench.config.seed != seed:
            from fedllm.commands.comparison_bench import Bench

            bench = Bench(replace(config, seed=seed), args.num_clients, args.benchmark)
        path = _result(out, seed, arm)
        path.parent.mkdir(exist_ok=True)
        row = {"arm": arm, "seed": seed, **bench.measure(arm, path.parent)}
        write_atomic(path, (json.dumps(row, indent=2) + "\n").encode())
        yield row


def _result(out: Path, seed: int, arm: str) -> Path:
    return out / f"seed-{seed}" / f"{arm}.json"


def _keep_setting(path: Path, setting: dict[str, Any]) -> None:
    """Write what is compared, or hold it against what the folder was made with.

    Raises:
        ConfigError: The folder belongs to another comparison.
    """
    text = json.dumps(setting, indent=2, sort_keys=True) + "\n"
    if path.exists() and path.read_text("utf-8") != text:
        raise ConfigError(
            f"--out: {path.parent} holds a comparison of other settings: name another"
        )
    write_atomic(path, text.encode())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=BUDGET,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--run-config", required=True, metavar="FILE.toml")
    parser.add_argument("--num-clients", type=int, default=20, metavar="N")
    parser.add_argument("--seed", type=int, nargs="+", help="default: the config's")
    parser.add_argument("--benchmark", metavar="FILE.jsonl", help="multiple choice")
    parser.add_argument(
        "--arms", nargs="+", choices=ARMS, default=ARMS, help="default: all"
    )
    parser.add_argument(
        "--alone", type=int, metavar="K", help="train K of the clients alone, not all"
    )
    parser.add_argument("--out", metavar="DIR", help="default: under runs/")
    return parser


if __name__ == "__main__":
    main()
