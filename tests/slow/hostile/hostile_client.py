"""A ClientApp for tests: honest where the node's config names no attacker.

Attacker k of three makes attack 3 * (round - 1) + k.
"""

import os
import pickle
import time

import numpy as np
from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Context,
    Message,
    MetricRecord,
    RecordDict,
)
from flwr.clientapp import ClientApp

from fedllm.client import reply_to

app = ClientApp()
SECRET = "what-only-this-node-knows"
BIG = int(os.environ.get("FEDLLM_TEST_REPLY_MEGABYTES", "200")) * 1_000_000
ATTACKERS = 3


@app.train()
def train(message: Message, context: Context) -> Message:
    attacker = context.node_config.get("attacker")
    if attacker is None:
        return reply_to(message, context)
    server_round = int(message.content.config_records["config"]["server-round"])
    number = ATTACKERS * (server_round - 1) + int(attacker)
    content = ATTACKS[number](message.content.array_records["arrays"])
    return Message(content, reply_to=message)


def changed(by):
    """An attack that sends the server's arrays, each changed."""

    def attack(sent):
        arrays = {name: Array(by(array.numpy())) for name, array in sent.items()}
        return RecordDict({"arrays": ArrayRecord(arrays)})

    return attack


def other(make):
    """An attack that sends other arrays."""

    def attack(sent):
        arrays = make({name: Array(array.numpy() + 9) for name, array in sent.items()})
        return RecordDict({"arrays": ArrayRecord(arrays)})

    return attack


def big(arrays):
    first = next(iter(arrays))
    return {**arrays, first: Array(np.zeros(BIG // 4, np.float32))}


def pickled(arrays):
    first = next(iter(arrays))
    data = pickle.dumps(np.zeros(3))
    return {**arrays, first: Array("float32", (3,), "numpy.ndarray", data)}


def absurd_metrics(sent):
    content = changed(lambda value: value + 9)(sent)
    content["metrics"] = MetricRecord(
        {"num-examples": 2**62, "train-loss": float("nan"), "epsilon": [1.0] * 10_000}
    )
    return content


def raises(sent):
    raise RuntimeError(SECRET)


def exits(sent):
    os._exit(3)


def hangs(sent):
    time.sleep(600)


def long_error(sent):
    text = SECRET + "x" * 1_000_000
    return RecordDict({"error": ConfigRecord({"code": "failed", "text": text})})


ATTACKS = [
    changed(lambda value: np.full_like(value, np.nan)),
    changed(lambda value: value + np.float32(1e30)),
    changed(lambda value: value + np.float32(500)),
    changed(lambda value: value.T.copy() if value.ndim == 2 else value),
    changed(lambda value: value.astype(np.int64)),
    changed(lambda value: value[None]),
    other(lambda arrays: {f"{name}x": value for name, value in arrays.items()}),
    other(lambda arrays: {**arrays, "another": Array(np.ones(3, np.float32))}),
    other(lambda arrays: dict(list(arrays.items())[1:])),
    other(lambda arrays: {str(i): Array(np.ones(1)) for i in range(2_000)}),
    other(big),
    other(pickled),
    absurd_metrics,
    lambda sent: RecordDict({"weights": sent}),
    lambda sent: RecordDict(),
    long_error,
    changed(lambda value: np.asfortranarray(value + 9)),
    changed(lambda value: value.astype(">f8") - 9),
    # Together at the end: one round waits for the time limit.
    raises,
    exits,
    hangs,
]
