"""The ClientApp: hand each message to the client, which always replies."""

import sys

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedllm.client.message_handler import reply_to
from fedllm.deployment.ray_walls import close_this_process_ray
from fedllm.logs import show_log

# Flower imports this module before it starts Ray, and reads what is set here. A node of a
# deployment has no Ray.
if "flwr.simulation" in sys.modules:
    close_this_process_ray()

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


@app.query()
def query(message: Message, context: Context) -> Message:
    """Count a run that is announced, or declare this client's rows, before round 1."""
    show_log()
    return reply_to(message, context)


@app.query("hello")
def hello(message: Message, context: Context) -> Message:
    """Check a sealed run before round 1, and name this node's key of it if it is a trustee."""
    show_log()
    return reply_to(message, context)


@app.query("tally")
def tally(message: Message, context: Context) -> Message:
    """Open a sealed round's pads, with this trustee's noise; loads no model."""
    show_log()
    return reply_to(message, context)


@app.query("deliver")
def deliver(message: Message, context: Context) -> Message:
    """Keep the released adapter, from which the node's owner may train a personal one."""
    show_log()
    return reply_to(message, context)
