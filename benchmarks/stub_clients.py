"""The ClientApp of scale.py: replies at once with arrays of the adapter's shapes."""

import os

import numpy as np
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from fedllm.wire.masking import masked

os.environ.setdefault("RAY_raylet_start_wait_time_s", "120")

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """Move every value a little, in a way of this client's own."""
    step = 1e-4 * (1 + int(context.node_config["partition-id"]) % 7)
    arrays = {
        name: Array(array.numpy() + np.float32(step))
        for name, array in message.content.array_records["arrays"].items()
    }
    content = RecordDict({"arrays": ArrayRecord(arrays)})
    if context.run_config["privacy.unit"] == "none":
        metrics = {"num-examples": 1, "train-loss": 1.0}
        content["metrics"] = MetricRecord(metrics)
    return Message(masked(content), reply_to=message)
