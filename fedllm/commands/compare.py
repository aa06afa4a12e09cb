"""Does federation help? The same data, trained each way as well as that way can.

fedllm compare --run-config configs/private-20.toml --seed 0 1 2

Arms: the base model; federated without DP; federated with the DP that the config asks for;
all data in one place; each client alone; each client that trains on from a federation's
adapter. Federations are runs of fedllm's own round loop and clients, for the config's
rounds; under privacy.trust='trustees' the first clients are the trustees, as in a simulation. All other arms train to their own best: up to --passes over the rows, stopped by a
tenth of them, with the best of --rates. All share one resident base model in this process.
With personal.epochs above 0.0 a client that trains on does what a node does: by personal.*, on
its rows but the tenth that no round used, of which one half stops and the other half chooses.
Every finished arm is kept in the output folder: the same command, stopped and repeated,
trains only what is missing.

This needs all clients' data in one place, so it is for simulations on public data. Arms
without DP are not private, and no epsilon covers the table as a whole.
"""

import argparse
import json
import logging
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedllm.atomic_files import write_atomic
from fedllm.commands.comparison_arms import (
    ARMS,
    FEDERATIONS,
    arm_names,
    kind_of,
    start_of,
)
from fedllm.commands.options import (
    add_clients,
    add_json,
    add_out,
    add_run_config,
    log_to_stderr,
    main_of,
    new_parser,
    positive_float,
    positive_int,
    read_run_config,
    write_json,
)
from fedllm.config import RunConfig, fedllm_home, flat
from fedllm.errors import ConfigError
from fedllm.reporting.comparison import BUDGET, write_comparison


def run(args: argparse.Namespace) -> int:
    """Train the arms that are missing, and write the table of all."""
    log_to_stderr()
    try:
        content = _compare(args)
    except KeyboardInterrupt:
        sys.exit("stopped: the same command trains the arms that are missing")
    if args.json:
        write_json(content)
    return 0


def _compare(args: argparse.Namespace) -> dict[str, Any]:
    """Return the content of compare.json, and print progress and the table."""
    config = read_run_config(args.run_config)
    out = _output_folder(args)
    setting = {
        "run_config": {k: v for k, v in flat(config).items() if k != "seed"},
        "num_clients": args.clients,
        "benchmark": args.benchmark,
        "rates": args.rates,
        "passes": args.passes,
    }
    _keep_setting(out / "setting.json", setting)
    todo = list(_missing(args, config, out))
    began = time.monotonic()
    for done, row in enumerate(_measured(args, config, out, todo), start=1):
        left = (time.monotonic() - began) / done * (len(todo) - done)
        _print(
            args,
            f"seed {row['seed']}, {row['arm']}: test loss {row['test_loss']:.3f}; "
            f"{len(todo) - done} left, about {left / 60:.0f} min",
        )
    rows = [json.loads(p.read_text("utf-8")) for p in sorted(out.glob("seed-*/*.json"))]
    # An older version kept its ledgers beside the rows.
    rows = [row for row in rows if "arm" in row]
    _print(args, write_comparison(out, setting, rows) + f"\n{out}")
    content: dict[str, Any] = json.loads((out / "compare.json").read_text("utf-8"))
    return content


def _print(args: argparse.Namespace, text: str) -> None:
    """Print text: to stderr if standard output is for JSON."""
    stream = sys.stderr if args.json else sys.stdout
    stream.write(text + "\n")
    stream.flush()


def _output_folder(args: argparse.Namespace) -> Path:
    """Make the folder of the comparison: by default one of the settings' name."""
    files = [Path(value).stem for value in args.run_config if value.endswith(".toml")]
    name = "-".join(["compare", *files, str(args.clients)])
    out = Path(args.out) if args.out else fedllm_home() / "runs" / name
    out.mkdir(parents=True, exist_ok=True)
    return out


def _missing(
    args: argparse.Namespace, config: RunConfig, out: Path
) -> Iterator[tuple[int, str]]:
    """Yield the seed and the name of each arm that is asked for and not there yet.

    `personal` is of the federations that are asked for or there already; if none is, of all.
    """
    for seed in args.seed or [config.seed]:
        names = arm_names(config, args.clients, args.alone)
        trained = [
            name
            for name in names
            if name in FEDERATIONS
            and (name in args.arms or _result(out, seed, name).exists())
        ]
        for arm in names:
            if kind_of(arm) == "personal" and trained and start_of(arm) not in trained:
                continue
            if kind_of(arm) in args.arms and not _result(out, seed, arm).exists():
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
            from fedllm.training.own_best import OwnBestConfig

            own_best = OwnBestConfig(args.rates, args.passes, seed)
            bench = Bench(
                replace(config, seed=seed), args.clients, args.benchmark, own_best
            )
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


def parser() -> argparse.ArgumentParser:
    """Return the command's parser."""
    parser = new_parser("compare", __doc__)
    parser.epilog = BUDGET
    add_run_config(parser)
    add_clients(parser, "number of clients (default: %(default)s)")
    parser.set_defaults(clients=20)
    parser.add_argument(
        "--num-clients",
        dest="clients",
        type=int,
        metavar="N",
        help="another name of --clients",
    )
    parser.add_argument(
        "--seed", type=int, nargs="+", help="seeds (default: the config's)"
    )
    parser.add_argument(
        "--benchmark", metavar="FILE.jsonl", help="multiple choice questions to score"
    )
    parser.add_argument(
        "--arms",
        nargs="+",
        choices=ARMS,
        default=ARMS,
        help="arms to train (default: all)",
    )
    parser.add_argument(
        "--alone",
        type=positive_int,
        metavar="K",
        help="train K of the clients alone, and these on from each federation "
        "(default: all)",
    )
    parser.add_argument(
        "--rates",
        type=positive_float,
        nargs="+",
        default=[0.002, 0.004],
        metavar="RATE",
        help="Adam's learning rates of which an arm that is no federation takes its best "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--passes",
        type=positive_float,
        default=4.0,
        help="passes over its rows that such an arm makes at most (default: %(default)s)",
    )
    add_out(parser, "folder of the comparison (default: one under runs/)")
    add_json(parser)
    return parser


main = main_of(parser, run)

if __name__ == "__main__":
    main()
