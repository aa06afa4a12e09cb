"""Time to the same validation loss if three of ten clients are ten times slower.

The server's real loop, strategy and clients, on a random model of two layers that every client
trains for real; only the clock is simulated: a reply is there after `--fast` seconds, or ten
times as long. Without DP. The target is the loss that waiting for all reaches after `--rounds`.

    OMP_NUM_THREADS=1 python benchmarks/late_replies.py
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest.mock import patch

from flwr.app import Message

sys.path.insert(0, str(Path(__file__).parent.parent))

from fedllm.client.message_handler import reply_to
from fedllm.config import flat
from fedllm.config_parsing import parse_run_config
from fedllm.server import late_replies, reply_stream
from fedllm.server.federation import Federation
from fedllm.server.local_grid import FIRST_NODE, LocalGrid
from fedllm.server.startup import set_up
from tests.helpers.tiny_models import CHAT_TEMPLATE, save_llama

ROOT = Path(__file__).parent.parent
NUM_CLIENTS, NUM_SLOW, SLOWER = 10, 3, 10
NUM_ROWS = {"train-0": 400, "test": 64}
ARMS: dict[str, dict[str, Any]] = {
    "wait for all": {},
    "drop the slow": {"strategy.min-replies": NUM_CLIENTS - NUM_SLOW},
    "late replies": {
        "strategy.min-replies": NUM_CLIENTS - NUM_SLOW,
        "strategy.late-replies": "next-round",
    },
}


class Clock:
    """A clock that only moves when it is slept on."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


class SlowGrid(LocalGrid):
    """Clients that train at once, and whose replies are there when they would have been."""

    def __init__(self, run_config: dict[str, Any], clock: Clock, fast: float) -> None:
        nodes = [
            {"partition-id": i, "num-partitions": NUM_CLIENTS}
            for i in range(NUM_CLIENTS)
        ]
        super().__init__(reply_to, nodes, run_config, 1)
        self._clock = clock
        self._seconds = [
            fast * (SLOWER if i >= NUM_CLIENTS - NUM_SLOW else 1)
            for i in range(NUM_CLIENTS)
        ]
        self._ready: dict[str, float] = {}
        self._free = [0.0] * NUM_CLIENTS

    def push_messages(self, messages: Any) -> list[str]:
        pushed = list(messages)
        ids = super().push_messages(pushed)
        for message_id, message in zip(ids, pushed, strict=True):
            client = message.metadata.dst_node_id - FIRST_NODE
            # A node works on one message after the other.
            began = max(self._clock.now, self._free[client])
            self._free[client] = began + self._seconds[client]
            self._ready[message_id] = self._free[client]
        return ids

    def pull_messages(self, message_ids: Any) -> list[Message]:
        ready = [i for i in message_ids if self._ready[i] <= self._clock.now]
        return super().pull_messages(ready)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--most", type=int, default=10, help="rounds of the others")
    parser.add_argument("--fast", type=float, default=60.0, help="simulated seconds")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    args = parser.parse_args()
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; {vars(args)}")
    for seed in args.seeds:
        target = 0.0
        for arm, settings in ARMS.items():
            is_first = arm == "wait for all"
            rounds = args.rounds if is_first else args.most
            curve = _curve(settings, rounds, args.fast, seed)
            if is_first:
                target = curve[-1][1]
            reached = [
                (i, now) for i, (now, loss) in enumerate(curve) if loss <= target
            ]
            when = (
                f"{reached[0][1] / 60:.0f} min, round {reached[0][0]}"
                if reached
                else f"not in {curve[-1][0] / 60:.0f} min"
            )
            print(
                f"seed {seed}, {arm}: {curve[0][1]:.3f} to {target:.3f}: {when}; best "
                f"{min(loss for _, loss in curve):.3f}",
                flush=True,
            )


def _curve(
    settings: dict[str, Any], rounds: int, fast: float, seed: int
) -> list[tuple[float, float]]:
    """Return simulated seconds and validation loss after each round, round 0 first."""
    clock, curve = Clock(), list[tuple[float, float]]()

    def note(self: Federation, report: Any) -> None:
        curve.append((clock.now, float(report.loss)))

    with tempfile.TemporaryDirectory(prefix="fedllm-late-") as folder:
        model = Path(folder) / "model"
        model.mkdir()
        save_llama(model)
        (model / "chat_template.jinja").write_text(CHAT_TEMPLATE)
        given = {**flat(parse_run_config({})), **_settings(model, rounds, seed)}
        # A trainer is built for each update, and reads all rows of its client.
        for key, name in (("data.name", "train-0"), ("data.public-validation", "test")):
            source = ROOT / "fedllm" / "data" / "wordnet_medical" / f"{name}.jsonl"
            lines = source.read_text("utf-8").splitlines(keepends=True)
            path = Path(folder) / f"{name}.jsonl"
            path.write_text("".join(lines[:: len(lines) // NUM_ROWS[name]]), "utf-8")
            given[key] = str(path)
        given.update(settings)
        with (
            patch.dict(os.environ, {"FEDLLM_HOME": str(Path(folder) / "home")}),
            patch.object(reply_stream, "time", clock),
            patch.object(late_replies, "time", clock),
            patch.object(Federation, "_record", note),
            patch.object(Federation, "_finish", lambda self: {}),
        ):
            grid = SlowGrid(given, clock, fast)
            set_up(parse_run_config(given), grid, 1).run()
    return curve


def _settings(model: Path, rounds: int, seed: int) -> dict[str, Any]:
    return {
        "seed": seed,
        "num-server-rounds": rounds,
        "model.name": str(model),
        "model.quantization": 0,
        "adapter.rank": 8,
        "adapter.target-modules": "all-linear",
        # What a client's rows are about differs, so that those of the slow are missed.
        "data.partition": "dirichlet",
        "data.partition-alpha": 0.2,
        "train.optimizer": "adamw",
        "train.learning-rate": 5e-3,
        "train.learning-rate-min": 5e-3,
        "train.local-steps": 3,
        "train.batch-size": 4,
        "train.max-length": 128,
        "strategy.server-learning-rate": 1.0,
        "strategy.server-learning-rate-min": 1.0,
        "strategy.round-timeout": 3600.0,
        "strategy.evaluate-examples": 48,
        "privacy.unit": "none",
        "privacy.target-epsilon": 0.0,
    }


if __name__ == "__main__":
    main()
