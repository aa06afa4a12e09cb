"""The rows that clients declare before round 1, as public numbers."""

import logging
from collections.abc import Sequence

from flwr.app import Message, MessageType, RecordDict
from flwr.serverapp import Grid

from fedllm.config import RunConfig
from fedllm.errors import FederationError
from fedllm.server.reply_stream import ReplyStream
from fedllm.wire.messages import CONFIG, own_config, read_declared_rows, read_reply

logger = logging.getLogger(__name__)


def ask_declared_rows(
    grid: Grid, config: RunConfig, population: Sequence[int], least_clients: int
) -> dict[int, int]:
    """Ask every client once how many rows its owner declares.

    Args:
        grid: Flower's way to the clients.
        config: The run config; its `strategy.round_timeout` limits the wait.
        population: Node ids of all clients.
        least_clients: Fewest clients that a run may have.

    Returns:
        Node id -> rows, in the order of the population, of the clients that declared some;
        the others take no part in the run.

    Raises:
        FederationError: Fewer than that declared some.
    """
    messages = [_question(node_id, config) for node_id in population]
    what = "persons" if config.data.person_column else "rows"
    declared: dict[int, int] = {}
    codes: dict[int, str] = {}
    for reply in ReplyStream(grid, messages, config.strategy.round_timeout):
        node_id = reply.metadata.src_node_id
        count = read_declared_rows(reply)
        if count is None:
            codes[node_id] = read_reply(reply, {}).code or "malformed"
        else:
            declared[node_id] = count
    for node_id in population:
        if node_id not in declared:
            logger.warning(
                "node %d: takes no part, since it declared no %s (%s); a node with a file "
                "of its own needs declared-%s in its node config, and with "
                "privacy-unit='record' also privacy-noise='joint'; its own log has the reason",
                node_id,
                what,
                f"code {codes[node_id]}" if node_id in codes else "no answer in time",
                what,
            )
    if len(declared) < least_clients:
        raise FederationError(
            f"privacy.noise: 'joint' needs {least_clients} clients that declare their {what}, "
            f"and {len(declared)} of {len(population)} did: set declared-{what} in each node "
            "config"
        )
    counts = [declared[n] for n in population if n in declared]
    logger.info(
        "%s: %d clients declared %d together (%d to %d each)",
        what,
        len(counts),
        sum(counts),
        min(counts),
        max(counts),
    )
    return {n: declared[n] for n in population if n in declared}


def _question(node_id: int, config: RunConfig) -> Message:
    return Message(
        content=RecordDict({CONFIG: own_config({})}),
        dst_node_id=node_id,
        message_type=MessageType.QUERY,
        ttl=config.strategy.round_timeout,
        group_id="0",
    )
