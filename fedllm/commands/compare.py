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
from functools import cached_property
from pathlib import Path
from typing import Any

from fedllm.atomic_files import write_atomic
from fedllm.commands.options import read_config
from fedllm.config import RunConfig, fedllm_home, flat, parse_run_config
from fedllm.errors import ConfigError, FederationError, FedllmError
from fedllm.reporting.comparison import BUDGET, write_comparison

ARMS = ("base", "federated", "federated-dp", "centralised", "alone")
_SERVER = 100
"""Node id of the first client."""


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
    seeds = args.seed or [config.seed]
    todo = [
        (seed, arm)
        for seed in seeds
        for arm in _asked(args, arms(config, args.num_clients, args.alone))
        if not _result(out, seed, arm).exists()
    ]
    began = time.monotonic()
    bench: Bench | None = None
    for done, (seed, arm) in enumerate(todo):
        if bench is None or bench.config.seed != seed:
            bench = Bench(replace(config, seed=seed), args.num_clients, args.benchmark)
        path = _result(out, seed, arm)
        path.parent.mkdir(exist_ok=True)
        row = {"arm": arm, "seed": seed, **bench.measure(arm, path.parent)}
        write_atomic(path, (json.dumps(row, indent=2) + "\n").encode())
        left = (time.monotonic() - began) / (done + 1) * (len(todo) - done - 1)
        sys.stdout.write(
            f"seed {seed}, {arm}: test loss {row['test_loss']:.3f}; "
            f"{len(todo) - done - 1} left, about {left / 60:.0f} min\n"
        )
        sys.stdout.flush()
    rows = [json.loads(p.read_text("utf-8")) for p in sorted(out.glob("seed-*/*.json"))]
    rows = [row for row in rows if "arm" in row]
    sys.stdout.write(write_comparison(out, setting, rows) + f"\n{out}\n")


def arms(config: RunConfig, num_clients: int, alone: int | None = None) -> list[str]:
    """Return the names of what is trained; the dear ones last.

    Args:
        config: The run config.
        num_clients: N.
        alone: How many clients are trained alone, evenly spaced; None: all.
    """
    names = ["base", "federated"]
    if config.privacy.unit == "client":
        names.append("federated-dp")
    number = num_clients if alone is None else min(alone, num_clients)
    chosen = [i * num_clients // number for i in range(number)]
    return [*names, "centralised", *(f"alone-{i}" for i in chosen)]


def _asked(args: argparse.Namespace, names: list[str]) -> list[str]:
    return [name for name in names if re.sub(r"-\d+$", "", name) in args.arms]


def without_privacy(config: RunConfig) -> RunConfig:
    """Return the twin of a config that promises nothing and differs in nothing else."""
    mapping = {k: v for k, v in flat(config).items() if not k.startswith("privacy.")}
    mapping |= {"privacy.unit": "none", "privacy.target-epsilon": 0.0}
    if mapping["strategy.sampling"] == "poisson":
        mapping["strategy.sampling"] = "fixed"
    return parse_run_config(mapping)


def centralised(config: RunConfig, num_clients: int) -> RunConfig:
    """Return a config of one client that sees as many examples as all together.

    Under `train.local-epochs` that is so of itself where all clients are asked.
    """
    config = without_privacy(config)
    sampled = config.strategy.num_sampled(num_clients)
    train = config.train
    if train.local_steps:
        train = replace(train, local_steps=train.local_steps * sampled)
    else:
        epochs = train.local_epochs * sampled / num_clients
        train = replace(train, local_epochs=epochs)
    strategy = replace(config.strategy, sampling="all")
    # One client has all rows under any partition, and `natural` refuses one client.
    data = replace(config.data, partition="iid")
    return replace(config, data=data, train=train, strategy=strategy)


class Bench:
    """One seed's clients, public rows and resident base model.

    Args:
        config: The run config, with the seed.
        num_clients: N.
        benchmark: File of multiple choice questions, or None.
    """

    def __init__(
        self, config: RunConfig, num_clients: int, benchmark: str | None
    ) -> None:
        from fedllm.adapters.peft_model import initial_arrays
        from fedllm.client.cache import resident_model
        from fedllm.evaluation.multiple_choice import load_questions
        from fedllm.evaluation.public_rows import PublicRows
        from fedllm.planning.adapter_choice import choose_adapter, with_choice
        from fedllm.wire.task_identity import set_task_identity

        set_task_identity()
        if config.adapter.kind == "auto":
            config = with_choice(config, choose_adapter(config, num_clients))
        self.config = config
        self.num_clients = num_clients
        home = fedllm_home()
        self._resident = resident_model(config)
        self.spec = self._resident.adapted.spec
        self._start = initial_arrays(self.spec)
        self._public = PublicRows(config, home, self._resident.adapted)
        self._questions = load_questions(Path(benchmark)) if benchmark else None

    def measure(self, arm: str, folder: Path) -> dict[str, Any]:
        """Train an arm, let validation choose its round, and score that once.

        Args:
            arm: One of `arms`.
            folder: Where the ledger of the private arm is written.
        """
        began = time.monotonic()
        if arm == "base":
            return self._score(self._start, 0, [], began)
        nodes = [(i, self.num_clients) for i in range(self.num_clients)]
        if arm == "federated-dp":
            return self._federate(self.config, nodes, _free(folder))
        if arm == "federated":
            return self._federate(without_privacy(self.config), nodes, None)
        if arm == "centralised":
            config = centralised(self.config, self.num_clients)
            return self._federate(config, [(0, 1)], None)
        config = without_privacy(self.config)
        config = replace(config, strategy=replace(config.strategy, sampling="all"))
        return self._federate(config, [nodes[int(arm.split("-")[1])]], None)

    @cached_property
    def _start_loss(self) -> float | None:
        """Validation loss before training, the same in every arm."""
        return self._public.validation_loss(self._start)

    def _federate(
        self, config: RunConfig, nodes: Sequence[tuple[int, int]], ledger_path: Any
    ) -> dict[str, Any]:
        """Run rounds over partitions, each (id, number of partitions)."""
        from flwr.app import ConfigRecord

        from fedllm.planning.noise import privacy_settings
        from fedllm.privacy.ledger import Ledger
        from fedllm.strategy.build import make_strategy
        from fedllm.wire.messages import ADAPTER_KIND, array_record, read_global

        began = time.monotonic()
        ledger = None
        if ledger_path is not None:
            d = self.spec.num_trainable
            settings = privacy_settings(config, len(nodes), d)
            ledger = Ledger.create(ledger_path, settings)
        ids = [_SERVER + index for index in range(len(nodes))]
        strategy = make_strategy(config, dict(self._start), ids, ledger)
        arrays, best = self._start, self._start
        losses = [self._start_loss]
        best_round, megabytes, failures = 0, 0.0, []
        for server_round in range(1, config.num_server_rounds + 1):
            if ledger and not ledger.may_spend(config.privacy.max_epsilon):
                break
            messages = strategy.configure_train(
                server_round,
                array_record(arrays),
                ConfigRecord({ADAPTER_KIND: self.spec.kind}),
                None,  # type: ignore[arg-type] # nothing is sent
            )
            replies = self._replies(messages, config, nodes)
            record, _ = strategy.aggregate_train(server_round, replies)
            seen = strategy.round
            megabytes += (seen.bytes_down + seen.bytes_up) / 1e6
            failures += [text or code for _, code, text in seen.rejected]
            if record is not None:
                arrays = read_global(record, self.spec.trained_shapes)
            last = server_round == config.num_server_rounds
            if server_round % config.strategy.evaluate_every and not last:
                continue
            loss = self._public.validation_loss(arrays)
            known = [value for value in losses if value is not None]
            losses.append(loss)
            if loss is None or loss < min(known):
                best, best_round = arrays, server_round
        secret = config.cohorts_are_secret
        # A client without a usable row fails in every round; nobody trained is an error.
        if not secret and failures and arrays is self._start:
            raise FederationError(f"no client trained: {failures[0]}")
        row = self._score(best, best_round, losses, began)
        row["megabytes"] = None if secret or len(nodes) == 1 else megabytes
        row["failed_replies"] = None if secret else len(failures)
        # How long a cohort takes tells how many it has.
        row["seconds"] = None if secret else row["seconds"]
        if ledger is not None:
            spent = ledger.epsilons()
            row["epsilon"] = spent.zero_out
            row["epsilon_replace_one"] = spent.replace_one
        return row

    def _replies(
        self, messages: Any, config: RunConfig, nodes: Sequence[tuple[int, int]]
    ) -> Iterator[Any]:
        """Let clients answer one at a time, through the ClientApp's own function."""
        from flwr.app import Context, RecordDict

        from fedllm.client.message_handler import reply_to

        for message in messages:
            node_id = message.metadata.dst_node_id
            partition_id, count = nodes[node_id - _SERVER]
            node = {"partition-id": partition_id, "num-partitions": count}
            yield reply_to(
                message, Context(1, node_id, node, RecordDict(), flat(config))
            )

    def _score(
        self, arrays: Any, best_round: int, losses: list[Any], began: float
    ) -> dict[str, Any]:
        """Score the chosen adapter on test rows and questions; the only time."""
        from fedllm.data.prompts import chat_prompt
        from fedllm.evaluation.multiple_choice import multiple_choice

        seconds = time.monotonic() - began
        score = self._public.test_loss(arrays)
        if score is None:
            raise ConfigError(
                "data.public-test: compare needs public test rows: name a file"
            )
        row: dict[str, Any] = {
            "validation_losses": losses,
            "best_round": best_round,
            "test_loss": score.loss,
            "perplexity": score.perplexity,
            "test_examples": score.num_examples,
            "seconds": seconds,
            "megabytes": None,
            "failed_replies": 0,
            "epsilon": None,
            "accuracy": None,
        }
        if self._questions is not None:
            adapted = self._resident.adapted
            adapted.set(arrays)
            tokenizer = adapted.tokenizer
            choice = multiple_choice(
                adapted.model,
                tokenizer,
                self._questions,
                lambda q: chat_prompt(tokenizer, q),
            )
            row |= {"accuracy": choice.accuracy, "chance": choice.chance}
        return row


def _result(out: Path, seed: int, arm: str) -> Path:
    return out / f"seed-{seed}" / f"{arm}.json"


def _free(folder: Path) -> Path:
    """Return a fresh ledger's path: one of an attempt that was stopped is kept."""
    number = 1
    while (path := folder / f"privacy-{number}.json").exists():
        number += 1
    return path


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
