"""Run fedllm's canaries on Flower's four strategies with differential privacy.

    python benchmarks/evidence.py
    python benchmarks/evidence.py --silent 0

Canary clients take part by a fair coin each, and one that does not sends nothing: the zero-out
relation that `fedllm audit` uses. Beside them are clients that a strategy was told of and that
never answer (`--silent`). `accounted` is what the noise multiplier stands for if each
client counts once and the noise is on the sum; `certified` is the lower bound on epsilon that
guesses from the release prove, with confidence 95 %. A strategy is convicted if the second is
above the first. Each strategy is given the noise, clipping norm and number of clients that it
asks for, and each client clips as Flower's own mod does if clipping is the client's part.
"""

import argparse
import json
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from flwr.app import (
    Array,
    ArrayRecord,
    Message,
    MetricRecord,
    RecordDict,
)
from flwr.serverapp.strategy import (
    DifferentialPrivacyClientSideAdaptiveClipping,
    DifferentialPrivacyClientSideFixedClipping,
    DifferentialPrivacyServerSideAdaptiveClipping,
    DifferentialPrivacyServerSideFixedClipping,
    FedAvg,
)
from flwr.supercore.differential_privacy import (
    KEY_NORM_BIT,
    adaptive_clip_inputs_inplace,
    compute_clip_model_update,
)

from fedllm.auditing.canary_clients import run_canaries
from fedllm.auditing.harness import MakeStrategy, Setup, flat_values
from fedllm.config_parsing import parse_run_config
from fedllm.planning.noise import privacy_settings
from fedllm.privacy.ledger import Ledger
from fedllm.strategy.build import make_strategy
from fedllm.wire.messages import array_record, read_reply

Arrays = dict[str, np.ndarray]


class _Step:
    """A server optimiser that takes the mean update as it is."""

    moments: dict[str, Any] = {}

    def step(self, update: np.ndarray, learning_rate: float) -> np.ndarray:
        return update


class Adapted:
    """One of Flower's strategies in the form that the bench of the audit drives."""

    def __init__(
        self, inner: Any, start: Arrays, population: list[int], ledger: Ledger
    ):
        self.inner, self.population, self.ledger = inner, population, ledger
        self.reference, self.optimizer, self.generator = start, _Step(), None
        self.strategy = self

    def configure_train(self, *_: Any) -> list[Message]:
        return [Message(RecordDict(), node, "train") for node in self.population]

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord, None]:
        self.ledger.spend(server_round)
        shapes = {name: value.shape for name, value in self.reference.items()}
        sent = [
            self._sent(dict(read_reply(reply, shapes).arrays or {}), reply)
            for reply in replies
        ]
        self.inner.current_arrays = array_record(self.reference)
        record, _ = self.inner.aggregate_train(server_round, sent)
        new = dict(zip(self.reference, record.to_numpy_ndarrays(), strict=True))
        names = list(self.reference)
        update = flat_values(new, names) - flat_values(self.reference, names)
        self.optimizer.step(update, 1.0)
        self.reference = new
        return record, None

    def _sent(self, arrays: Arrays, reply: Message) -> Message:
        """Return a reply as a client of Flower's would send it, clipped if that is its part."""
        values = [np.array(arrays[name]) for name in self.reference]
        base, bit = list(self.reference.values()), False
        if isinstance(self.inner, DifferentialPrivacyClientSideFixedClipping):
            compute_clip_model_update(values, base, self.inner.clipping_norm)
        elif isinstance(self.inner, DifferentialPrivacyClientSideAdaptiveClipping):
            update = [v - b for v, b in zip(values, base, strict=True)]
            bit = adaptive_clip_inputs_inplace(update, self.inner.clipping_norm)
            values = [b + u for b, u in zip(base, update, strict=True)]
        named = zip(self.reference, map(Array, values), strict=True)
        metrics = MetricRecord({"num-examples": 1, KEY_NORM_BIT: int(bit)})
        content = RecordDict({"arrays": ArrayRecord(dict(named)), "metrics": metrics})
        asked = Message(RecordDict(), reply.metadata.src_node_id, "train")
        return Message(content, reply_to=asked)


def adapted(kind: Callable[..., Any]) -> MakeStrategy:
    """Return what makes one of Flower's strategies for the bench."""

    def make(config: Any, start: Any, population: list[int], ledger: Any) -> Any:
        settings = ledger.settings
        norm = "clipping_norm" if "Fixed" in kind.__name__ else "initial_clipping_norm"
        inner = kind(
            FedAvg(),
            noise_multiplier=settings.noise_multiplier,
            num_sampled_clients=len(population),
            **{norm: settings.clipping_norm},
        )
        return Adapted(inner, start, population, ledger)

    return make


@dataclass(frozen=True)
class Subject:
    """A strategy, and what makes it."""

    name: str
    make: MakeStrategy


SUBJECTS = [
    Subject("fedllm ClientLevelDP", make_strategy),
    *(
        Subject(f"Flower {kind.__name__}", adapted(kind))
        for kind in (
            DifferentialPrivacyServerSideFixedClipping,
            DifferentialPrivacyClientSideFixedClipping,
            DifferentialPrivacyServerSideAdaptiveClipping,
            DifferentialPrivacyClientSideAdaptiveClipping,
        )
    ),
]


def main() -> None:
    """Print one JSON line a strategy."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--canaries", type=int, default=400)
    parser.add_argument("--silent", type=int, default=1200)
    parser.add_argument("--dimension", type=int, default=40_000)
    parser.add_argument("--noise-multiplier", type=float, default=2.0)
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    config = parse_run_config(
        {
            "privacy.target-epsilon": 0.0,
            "privacy.noise-multiplier": args.noise_multiplier,
            "privacy.delta": 1e-5,
        }
    )
    clients = args.canaries + args.silent
    settings = privacy_settings(config, clients, args.dimension)
    for subject in SUBJECTS:
        setup = Setup(config, settings, args.dimension, subject.make)
        with setup.bench(args.dimension, clients) as bench:
            found = run_canaries(bench, args.canaries, 1, honest=False)
        certified, estimate = found.certified, found.estimate
        line = {
            "strategy": subject.name,
            "accounted": round(found.accounted, 3),
            "certified": round(certified.epsilon, 3),
            "right": f"{certified.num_correct} of {certified.num_guesses}",
            "estimate": None if estimate is None else round(estimate.epsilon, 3),
            "convicted": certified.epsilon > found.accounted,
        }
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
