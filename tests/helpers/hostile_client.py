"""A ClientApp for tests: honest where the node's config names no attacker.

Attacker k of six makes attack 6 * (round - 1) + k, or the one that its config names, from
the round that it names.
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

from fedllm.client.message_handler import reply_to
from fedllm.wire.masking import masked

app = ClientApp()
SECRET = "what-only-this-node-knows"
BIG = int(os.environ.get("FEDLLM_TEST_REPLY_MEGABYTES", "200")) * 1_000_000
MANY = int(os.environ.get("FEDLLM_TEST_REPLY_ARRAYS", "2000"))
ATTACKERS = 6


@app.train()
def train(message: Message, context: Context) -> Message:
    attacker = context.node_config.get("attacker")
    server_round = int(message.content.config_records["config"]["server-round"])
    begins = int(context.node_config.get("attack-from", 1))
    if attacker is None or server_round < begins:
        return reply_to(message, without_attack(context))
    number = ATTACKERS * (server_round - 1) + int(attacker)
    name = context.node_config.get("attack")
    attack = NAMED[str(name)] if name else ATTACKS[number]
    if attack in FORGED:
        return attack(message, context)
    content = attack(message.content.array_records["arrays"])
    keep_id(message, context)
    return Message(content, reply_to=message)


def without_attack(context):
    """The context of an honest node, whose config holds fedllm's keys alone."""
    node = {k: v for k, v in context.node_config.items() if "attack" not in k}
    return Context(
        context.run_id, context.node_id, node, context.state, context.run_config
    )


def keep_id(message, context):
    """Remember a message, to reply to it again in a later round."""
    known = {"id": message.metadata.message_id}
    context.state["known"] = ConfigRecord(known)


def changed(by):
    """An attack that sends the server's arrays, each changed."""

    def attack(sent):
        arrays = {name: Array(by(array.numpy())) for name, array in sent.items()}
        return masked(RecordDict({"arrays": ArrayRecord(arrays)}))

    return attack


def other(make):
    """An attack that sends other arrays."""

    def attack(sent):
        arrays = make({name: Array(array.numpy() + 9) for name, array in sent.items()})
        return masked(RecordDict({"arrays": ArrayRecord(arrays)}))

    return attack


def big(arrays):
    """So many bytes, none of them twice."""
    first = next(iter(arrays))
    values = np.random.default_rng().bytes(BIG)
    return {**arrays, first: Array("float32", (BIG // 4,), "numpy.ndarray", values)}


def swelling(sent):
    """Five megabytes on the wire, BIG once it is read: one chunk, many times over."""
    chunk = Array("float32", (1,), "numpy.ndarray", bytes(5 * 2**20))
    content = masked(RecordDict({"arrays": ArrayRecord(dict.fromkeys(sent, chunk))}))
    # A record copies its arrays.
    for array in content.array_records["arrays"].values():
        array.__dict__["_chunks"] = array.slice_array() * (BIG // (5 * 2**20) + 1)
    return content


def many(arrays):
    """So many arrays, each another object on the wire."""
    return {str(i): Array(np.full(1, i)) for i in range(MANY)}


def million_names(sent):
    """A million arrays that are one object on the wire, without a mask."""
    content = masked(RecordDict())
    names = map(str, range(1_000_000))
    content["arrays"] = ArrayRecord(dict.fromkeys(names, Array(np.ones(1))))
    return content


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


def forged(change):
    """An attack by what a reply says of itself."""

    def attack(message, context):
        content = changed(lambda value: value + 9)(
            message.content.array_records["arrays"]
        )
        reply = Message(content, reply_to=message)
        change(reply.metadata.__dict__, context)
        return reply

    return attack


def another_sender(metadata, context):
    metadata["_src_node_id"] += 1


def another_round(metadata, context):
    metadata["_reply_to_message_id"] = context.state["known"]["id"]


def another_run(metadata, context):
    metadata["_run_id"] += 1


def raises(sent):
    raise RuntimeError(SECRET)


def exits(sent):
    os._exit(3)


def hangs(sent):
    time.sleep(600)


def long_error(sent):
    text = SECRET + "x" * 1_000_000
    return masked(RecordDict({"error": ConfigRecord({"code": "failed", "text": text})}))


FORGED = [forged(another_sender), forged(another_round), forged(another_run)]
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
    other(many),
    other(big),
    other(pickled),
    absurd_metrics,
    lambda sent: masked(RecordDict({"weights": sent})),
    # As from a version that had no mask.
    lambda sent: RecordDict({"arrays": sent}),
    long_error,
    changed(lambda value: np.asfortranarray(value + 9)),
    changed(lambda value: value.astype(">f8") - 9),
    swelling,
    million_names,
    lambda sent: RecordDict({str(i): ConfigRecord({"x": i}) for i in range(200)}),
    raises,
    # Twice, so that the last six are one round.
    swelling,
    long_error,
    # Together at the end: this round waits for the time limit.
    exits,
    hangs,
    *FORGED,
    raises,
]
NAMED = {
    "big": other(big),
    "swelling": swelling,
    "many": other(many),
    "long error": long_error,
    "raises": raises,
}
