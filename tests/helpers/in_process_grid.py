"""A grid without processes: it calls the ClientApp's function when replies are pulled."""

from collections.abc import Callable, Iterable
from typing import Any

from flwr.app import Context, Message, RecordDict
from flwr.serverapp import Grid

from tests.helpers.flower_messages import RUN_ID, set_task_identity


class InProcessGrid(Grid):
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
        client: Callable[[Message, Context], Message | None],
        order: Callable[[list[int]], list[int]] = list,
    ) -> None:
        set_task_identity()
        self.contexts = {
            100 + index: Context(RUN_ID, 100 + index, node, RecordDict(), run_config)
            for index, node in enumerate(node_configs)
        }
        self.client = client
        self.order = order
        self.sent: list[Message] = []
        self.pulls: list[int] = []
        self._waiting: dict[str, Message] = {}
        self._turn: list[str] = []

    def set_run(self, run: Any) -> None:
        """Do nothing: there is one run."""

    @property
    def run(self) -> Any:
        """The one run."""
        return None

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        """Make a message."""
        raise AssertionError("deprecated in Flower")

    def get_node_ids(self) -> Iterable[int]:
        """Return the clients."""
        return list(self.contexts)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Take messages to be answered."""
        ids = []
        for message in messages:
            message_id = f"{message.metadata.group_id}-{message.metadata.dst_node_id}"
            message_id += f"-{len(self.sent)}"
            message.metadata.__dict__["_message_id"] = message_id
            self._waiting[message_id] = message
            self.sent.append(message)
            ids.append(message_id)
        positions = self.order(list(range(len(ids))))
        self._turn = [ids[position] for position in positions]
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Answer, in the given order of readiness, what is asked for."""
        asked = list(message_ids)
        self.pulls.append(len(asked))
        replies = []
        for message_id in asked:
            if not self._turn or self._turn[0] != message_id:
                continue
            self._turn.pop(0)
            message = self._waiting.pop(message_id)
            reply = self.client(message, self.contexts[message.metadata.dst_node_id])
            if reply is not None:
                replies.append(reply)
        return replies

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Is not how fedllm asks: it would hold all replies at once."""
        raise AssertionError("fedllm pulls one reply at a time")
