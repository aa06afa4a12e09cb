"""Megabytes on the wire against held-out loss, for each encoding.

    python benchmarks/wire.py bytes
    python benchmarks/wire.py loss --epsilon 8
    python benchmarks/wire.py loss --epsilon 8 --kind lora-core

`bytes` encodes adapters of OpenLLaMA-3B's shape and counts what 100 rounds with 2 clients
would send, both ways, against the bounds that the design set. `loss` federates 20 clients
for five rounds, as `benchmarks/frontier.py` does, with every update and every adapter sent
through the encoding; `int8 with feedback` adds to each update what rounding took from the
client's last one.
"""

import argparse
import sys
from typing import get_args

import numpy as np
from frontier import Bench, Vector, clipped, flatten, tell, unflatten

from fedllm.adapters.peft_model import initial_arrays
from fedllm.adapters.resolve import resolve
from fedllm.config import AdapterConfig, Encoding
from fedllm.models.layer_shapes import linear_shapes
from fedllm.privacy.accounting import calibrate
from fedllm.wire.encoding import pack, unpack
from fedllm.wire.messages import encoded_record

_ROUNDS = 5
_CLIENTS = 20
# Clipping norm, and server learning rate with and without noise.
_STEPS = {"ffa-lora": (0.6, 0.6, 1.0), "lora-core": (0.13, 23.0, 40.0)}
_OPENLLAMA_MESSAGES = 100 * 2 * 2
_BOUNDS = {"ffa-lora": 600.0, "lora-core": 2.0}


def count_bytes() -> bool:
    """Print megabytes of a whole OpenLLaMA run; tell whether the bounds hold."""
    shapes = linear_shapes("openlm-research/open_llama_3b_v2")
    generator = np.random.default_rng(0)
    held = True
    for kind, bound in _BOUNDS.items():
        config = AdapterConfig(kind=kind, rank=8)
        spec = resolve(config, shapes, {}, "llama", 0)
        arrays = {
            name: generator.standard_normal(shape).astype(np.float32)
            for name, shape in spec.trained_shapes.items()
        }
        for encoding in get_args(Encoding):
            record = encoded_record(arrays, encoding, generator)
            message = sum(len(array.data) for array in record.values())
            total = message * _OPENLLAMA_MESSAGES / 1e6
            best = encoding == "int8"
            held = held and (total < bound or not best)
            tell(
                kind=kind,
                values=spec.num_trainable,
                encoding=encoding,
                megabytes_a_message=round(message / 1e6, 4),
                megabytes_of_100_rounds=round(total, 2),
                **({"bound": bound, "met": total < bound} if best else {}),
            )
    return held


def federate(
    bench: Bench, kind: str, encoding: Encoding, feedback: bool, epsilon: float
) -> None:
    """Print the losses of one federation, and the megabytes of a round."""
    shapes = bench.spec.trained_shapes
    generator = np.random.default_rng(0)

    def travelled(vector: Vector) -> Vector:
        packed = pack(unflatten(bench.spec, vector), encoding, generator)
        arrived = unpack(packed, shapes, encoding)
        return flatten({name: arrived[name] for name in shapes})

    clip, noisy, noiseless = _STEPS[kind]
    rate = noisy if epsilon else noiseless
    z = calibrate(epsilon, _ROUNDS, 1e-5, "all", 1.0) if epsilon else 0.0
    noise = np.random.default_rng(1000)
    vector = flatten(initial_arrays(bench.spec))
    left = np.zeros((_CLIENTS, vector.size))
    for server_round in range(1, _ROUNDS + 1):
        start = travelled(vector)
        updates = bench.updates(start, 8, server_round) + left
        arrived = np.stack([travelled(update) for update in updates])
        if feedback:
            left = updates - arrived
        mean = clipped(arrived, clip).mean(0)
        mean += z * clip / _CLIENTS * noise.standard_normal(vector.size)
        vector = vector + rate * mean
    tell(
        kind=kind,
        encoding=encoding + (" with feedback" if feedback else ""),
        epsilon=epsilon or None,
        megabytes_of_an_update=round(
            pack(unflatten(bench.spec, vector), encoding, generator).nbytes / 1e6, 4
        ),
        validation=round(bench.loss(vector, bench.validation), 4),
        test=round(bench.loss(vector, bench.test), 4),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("mode", choices=("bytes", "loss"))
    parser.add_argument("--epsilon", type=float, default=8.0, help="0: no noise")
    parser.add_argument("--kind", choices=_STEPS, default="ffa-lora")
    args = parser.parse_args()
    if args.mode == "bytes":
        sys.exit(0 if count_bytes() else 1)
    settings = argparse.Namespace(
        kind=args.kind,
        rank=8,
        target_modules="auto",
        partition="iid",
        clients=_CLIENTS,
    )
    bench = Bench(settings, 0)
    for encoding in get_args(Encoding):
        federate(bench, args.kind, encoding, False, args.epsilon)
    federate(bench, args.kind, "int8", True, args.epsilon)


if __name__ == "__main__":
    main()
