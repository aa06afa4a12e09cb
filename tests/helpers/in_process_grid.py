"""A grid without processes that notes what is asked of it, and in which order."""

from collections.abc import Callable, Iterable
from typing import Any

from flwr.app import Message

from fedllm.server.local_grid import Client, LocalGrid
from tests.helpers.flower_messages import RUN_ID


class InProcessGrid(LocalGrid):
    """Clients with node ids 100, 101, ... that answer in this process.

    Args:
        node_configs: One node config a client.
        run_config: What each client's context holds.
        client: Message and context -> reply; None for a client that stays silent.
        order: Reorders the ids in which replies become ready.
    """

    def __init__(
        self,
        node_configs: list[dict[str, Any]],
        run_config: dict[str, Any],
        client: Client,
        order: Callable[[list[int]], list[int]] = list,
    ) -> None:
        super().__init__(client, node_configs, run_config, RUN_ID)
        self.order = order
        self.sent: list[Message] = []
        self.pulls: list[int] = []
        self._turn: list[str] = []

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Take messages to be answered."""
        pushed = list(messages)
        ids = super().push_messages(pushed)
        self.sent += pushed
        positions = self.order(list(range(len(ids))))
        self._turn = [ids[position] for position in positions]
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Answer, in the given order of readiness, what is asked for."""
        asked = list(message_ids)
        self.pulls.append(len(asked))
        replies: list[Message] = []
        for message_id in asked:
            if self._turn and self._turn[0] == message_id:
                self._turn.pop(0)
                replies += super().pull_messages([message_id])
        return replies
