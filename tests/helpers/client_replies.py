"""What tests of a client ask it, and how they read its reply."""

from collections.abc import Callable
from typing import Any

from flwr.app import Message

from fedllm.wire.masking import WIRE
from fedllm.wire.messages import ARRAYS, ERROR, METRICS, read_reply

Answer = Callable[..., Message]
NODE = {"partition-id": 0, "num-partitions": 2}
WITHOUT_DP = {"privacy.unit": "none"}


def code_of(reply: Message) -> str:
    assert set(reply.content) == {ERROR, WIRE}
    return str(reply.content.config_records[ERROR]["code"])


def text_of(reply: Message) -> str:
    return str(reply.content.config_records[ERROR].get("text", ""))


def values(reply: Message, arrays: dict[str, Any]) -> dict[str, Any]:
    read = read_reply(reply, {name: a.shape for name, a in arrays.items()})
    assert read.code is None
    return dict(read.arrays or {})


RECORD = {"privacy.unit": "record", "privacy.delta": 1e-5}
# Two records of ten in a step, which the server noises.
JOINT = {
    **RECORD,
    "privacy.noise": "joint",
    "num-server-rounds": 4,
    "train.local-steps": 1,
}
NUMBERS = {"noise_multiplier": 2.0, "total_rows": 10}
"""What the server names in every message of such a run."""
LIMITS = {"privacy-unit": "record", "max-epsilon": 4.0, "delta": 1e-5}


def epsilon_of(reply: Message) -> float:
    assert set(reply.content) == {ARRAYS, METRICS, WIRE}
    metrics = dict(reply.content.metric_records[METRICS])
    assert set(metrics) == {"epsilon", "nonce"}
    return float(metrics["epsilon"])  # type: ignore[arg-type]
