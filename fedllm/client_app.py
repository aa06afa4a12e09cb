"""The ClientApp: hand each message to the client, which always replies."""

import os

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedllm.client.message_handler import reply_to
from fedllm.logs import show_log

# Flower imports this module before it starts Ray, whose node may take more than its
# 30 s to come up on a busy small machine.
os.environ.setdefault("RAY_raylet_start_wait_time_s", "120")

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train on this client's data."""
    show_log()
    return reply_to(message, context)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Evaluate on this client's data; without differential privacy only."""
    show_log()
    return reply_to(message, context)
