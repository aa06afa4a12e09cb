"""A run is announced to every client before any secret coin is tossed.

A node counts what all runs promised it (`fedllm.privacy.node_ledger`). It may count a run as
sampled only if it counts it whether or not a coin draws it, and nobody but the server can
tell it of a run that never draws it.
"""

import logging
from collections import Counter

from flwr.app import ConfigRecord, Message, MessageType, RecordDict
from flwr.serverapp import Grid

from fedllm.config import RunConfig
from fedllm.errors import FederationError
from fedllm.server.reply_stream import ReplyStream
from fedllm.wire.messages import CONFIG, own_config, read_reply

logger = logging.getLogger(__name__)

_REFUSALS = ("bad-config", "budget-spent", "not-approved")


def announce(
    config: RunConfig, grid: Grid, population: list[int], instructions: ConfigRecord
) -> None:
    """Ask every client to count the run, and log how many refuse it.

    A client that does not answer in time counts the run without amplification once it is
    asked for an update. The replies depend on no coin, so they may be logged.

    Args:
        config: The run config, with cohorts that are secret.
        grid: Flower's way to the clients.
        population: Node ids of all clients.
        instructions: What every message of the run holds.

    Raises:
        FederationError: Every client refuses: the run would be noise alone.
    """
    strategy = config.strategy
    timeout = min(strategy.round_timeout, strategy.wait_for_clients)
    messages = [
        Message(
            content=RecordDict({CONFIG: own_config(instructions)}),
            dst_node_id=node,
            message_type=MessageType.QUERY,
            ttl=timeout,
            group_id="announcement",
        )
        for node in population
    ]
    codes = Counter(
        read_reply(reply, {}).code for reply in ReplyStream(grid, messages, timeout)
    )
    refused = {code: codes[code] for code in _REFUSALS if codes[code]}
    if not refused:
        return
    causes = ", ".join(f"{code} x{number}" for code, number in refused.items())
    if sum(refused.values()) == len(population):
        raise FederationError(
            f"every client refuses this run: {causes}; each client's own log has the reason"
        )
    logger.warning(
        "%d of %d clients refuse this run: %s",
        sum(refused.values()),
        len(population),
        causes,
    )
