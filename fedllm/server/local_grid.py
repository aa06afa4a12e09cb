"""A grid without processes: the clients answer in this process, one after another."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from flwr.app import Context, Message, RecordDict
from flwr.serverapp import Grid

from fedllm.wire.task_identity import set_task_identity

FIRST_NODE = 100
"""Node id of the first client; the others follow."""

Client = Callable[[Message, Context], Message | None]
"""Message and context -> reply; None from a client that stays silent."""


class LocalGrid(Grid):
    """The real server loop's way to clients that share its process and its model.

    A client works when its reply is pulled, so one reply is in memory and no two clients
    train the one resident model at a time. A time limit does not cut a client's work off.

    Args:
        client: Answers every message, with the context of the client that it is for.
        node_configs: One node config a client.
        run_config: The run config in each client's context.
        run_id: The run id in each client's context.
    """

    def __init__(
        self,
        client: Client,
        node_configs: Sequence[Mapping[str, Any]],
        run_config: Mapping[str, Any],
        run_id: int,
    ) -> None:
        set_task_identity()
        self.client = client
        self.contexts = {
            node_id: Context(
                run_id, node_id, dict(node), RecordDict(), dict(run_config)
            )
            for node_id, node in enumerate(node_configs, start=FIRST_NODE)
        }
        self._unanswered: dict[str, Message] = {}
        self._num_sent = 0

    def set_run(self, run: Any) -> None:
        """Do nothing: there is one run."""

    @property
    def run(self) -> Any:
        """Flower's description of the run; there is none."""
        return None

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        """Raise: Flower has deprecated this."""
        raise NotImplementedError("make a flwr.app.Message")

    def get_node_ids(self) -> Iterable[int]:
        """Return the clients' node ids."""
        return list(self.contexts)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Take messages and return an id for each."""
        ids = []
        for message in messages:
            message_id = f"message-{self._num_sent}"
            message.metadata.__dict__["_message_id"] = message_id
            self._unanswered[message_id] = message
            self._num_sent += 1
            ids.append(message_id)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Return the clients' replies, made in this thread; each message is answered once."""
        replies = []
        for message_id in message_ids:
            message = self._unanswered.pop(message_id, None)
            if message is None:
                continue
            reply = self.client(message, self.contexts[message.metadata.dst_node_id])
            if reply is not None:
                replies.append(reply)
        return replies

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Raise: this would hold all replies at once."""
        raise NotImplementedError("pull one reply at a time")


def is_simulation(grid: Grid) -> bool:
    """Return whether a grid's clients are virtual, and so have partitions of one data set."""
    return isinstance(grid, LocalGrid) or type(grid).__name__ == "InMemoryGrid"
