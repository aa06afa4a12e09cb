"""The released adapter goes to every client after the last round, for personal training.

It is released already, so it tells a client nothing new of the others. What a client does with
it the server does not learn: the reply is the same from all, and sent before any training.
"""

import logging
from collections import Counter

from flwr.app import ArrayRecord, ConfigRecord
from flwr.serverapp import Grid

from fedllm.server.population import replace_departed
from fedllm.server.reply_stream import ReplyStream
from fedllm.strategy.fedavg import AdapterFedAvg
from fedllm.wire.messages import read_reply

logger = logging.getLogger(__name__)


def deliver(
    strategy: AdapterFedAvg, grid: Grid, arrays: ArrayRecord, instructions: ConfigRecord
) -> None:
    """Bring every client the released adapter, and log how many have it.

    Guarantee:
        The run has ended well before this, and still has after it, whatever a client or
        the network does. It costs at most as long as clients are waited for at the start.

    Args:
        strategy: Knows the clients, and how arrays travel.
        grid: Flower's way to the clients.
        arrays: The adapter.
        instructions: What every message of the run holds.
    """
    config, total = strategy.config.strategy, len(strategy.population)
    timeout = min(config.round_timeout, config.wait_for_clients)
    causes: Counter[str] = Counter()
    try:
        connected = set(grid.get_node_ids())
        strategy.population = replace_departed(strategy.population, connected)
        messages = strategy.configure_delivery(arrays, instructions)
        for reply in ReplyStream(grid, messages, timeout):
            causes[read_reply(reply, {}).code or ""] += 1
    except Exception as error:  # noqa: BLE001 - see the guarantee
        logger.warning("the adapter was not delivered to all clients: %r", error)
        return
    kept = causes.pop("", 0)
    if silent := total - kept - causes.total():
        causes["no answer"] = silent
    if causes:
        logger.warning(
            "the adapter is with %d of %d clients for their personal training; the others: "
            "%s; see each client's own log",
            kept,
            total,
            ", ".join(f"{code} x{number}" for code, number in causes.items()),
        )
        return
    logger.info(
        "the adapter is with all %d clients: fedllm node personal trains on from it on "
        "each node, and tells nobody",
        total,
    )
