"""The rows that clients declare before round 1, as public numbers."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

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
    said = DeclaredRows({}, {})
    for reply in ReplyStream(grid, messages, config.strategy.round_timeout):
        node_id = reply.metadata.src_node_id
        count = read_declared_rows(reply)
        if count is None:
            said.codes[node_id] = read_reply(reply, {}).code or "malformed"
        else:
            said.rows[node_id] = count
    return said.of(population, config, least_clients)


@dataclass
class DeclaredRows:
    """What nodes said when they were asked how many rows their owners declare.

    Attributes:
        rows: Node id -> rows, or persons.
        codes: Node id -> the code of one that declared none.
    """

    rows: dict[int, int]
    codes: dict[int, str]

    def of(
        self, population: Sequence[int], config: RunConfig, least_clients: int
    ) -> dict[int, int]:
        """Return the rows of those that declared some; arguments and errors as above."""
        what = "persons" if config.data.person_column else "rows"
        declared = {n: self.rows[n] for n in population if n in self.rows}
        for node_id in population:
            if node_id not in declared:
                self._log_silent(node_id, what)
        if len(declared) < least_clients:
            raise FederationError(
                f"privacy.noise: 'joint' needs {least_clients} clients that declare their "
                f"{what}, and {len(declared)} of {len(population)} did: set declared-{what} in "
                "each node config"
            )
        counts = list(declared.values())
        logger.info(
            "%s: %d clients declared %d together (%d to %d each)",
            what,
            len(counts),
            sum(counts),
            min(counts),
            max(counts),
        )
        return declared

    def _log_silent(self, node_id: int, what: str) -> None:
        code = self.codes.get(node_id)
        logger.warning(
            "node %d: takes no part, since it declared no %s (%s); a node with a file "
            "of its own needs declared-%s in its node config, and with "
            "privacy-unit='record' also privacy-noise='joint'; its own log has the reason",
            node_id,
            what,
            "no answer in time" if code is None else f"code {code}",
            what,
        )


def _question(node_id: int, config: RunConfig) -> Message:
    return Message(
        content=RecordDict({CONFIG: own_config({})}),
        dst_node_id=node_id,
        message_type=MessageType.QUERY,
        ttl=config.strategy.round_timeout,
        group_id="0",
    )
