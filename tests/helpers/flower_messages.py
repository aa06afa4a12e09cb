"""Flower messages and contexts outside a run."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from flwr.app import ConfigRecord, Context, Error, Message, RecordDict

from fedllm.config import Encoding
from fedllm.wire.masking import WIRE, WIRE_FORMAT, masked
from fedllm.wire.messages import (
    ADAPTER_KIND,
    ARRAYS,
    CONFIG,
    WIRE_FORMAT_KEY,
    encoded_record,
)
from fedllm.wire.task_identity import set_task_identity

RUN_ID = 7


def instruction(
    content: RecordDict | None = None, message_type: str = "train", node_id: int = 7
) -> Message:
    """Return a message from the server to a node."""
    set_task_identity()
    return Message(RecordDict() if content is None else content, node_id, message_type)


def reply(content: RecordDict | Error, node_id: int = 7) -> Message:
    """Return a node's reply to an instruction."""
    return Message(as_sent(content), reply_to=instruction(node_id=node_id))


def as_sent(content: RecordDict | Error) -> RecordDict | Error:
    """Return a reply's content masked, if it is not yet."""
    if isinstance(content, Error) or WIRE in content:
        return content
    return masked(content)


def train_instruction(
    arrays: Mapping[str, Any],
    server_round: int = 1,
    learning_rate: float = 0.5,
    message_type: str = "train",
    adapter_kind: str | None = None,
    encoding: Encoding = "float32",
    **more: Any,
) -> Message:
    """Return what the server asks of a client in a round; `more` goes into its config."""
    config: dict[str, Any] = {
        "server-round": server_round,
        "learning-rate": learning_rate,
        **{key.replace("_", "-"): value for key, value in more.items()},
        WIRE_FORMAT_KEY: WIRE_FORMAT,
    }
    if adapter_kind is not None:
        config[ADAPTER_KIND] = adapter_kind
    record = encoded_record(arrays, encoding, np.random.default_rng(0))
    content = RecordDict({ARRAYS: record, CONFIG: ConfigRecord(config)})
    return instruction(content, message_type)


def context(
    run_config: Mapping[str, Any], node_config: Mapping[str, Any] | None = None
) -> Context:
    """Return what Flower hands an app."""
    return Context(
        run_id=1,
        node_id=7,
        node_config=dict(node_config or {}),
        state=RecordDict(),
        run_config=dict(run_config),
    )
