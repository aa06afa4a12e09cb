"""Replies that come after their round, and count in the one that is open then.

Guarantee:
    Under client level a client adds at most one clipped update to any release: while its reply
    to an earlier round may still come it is asked for nothing, and once a node takes another's
    place no earlier reply counts, since both may be one client. Which replies count in a round
    is decided by its time limit alone (`ReplyStream`), whoever takes part, so that runs with
    and without one client differ, in each release, by what that client adds.
"""

import time
from collections.abc import Callable, Sequence

from flwr.app import Message
from flwr.serverapp import Grid

from fedllm.config import RunConfig
from fedllm.server.reply_stream import ReplyStream, Waiting


class LateReplies:
    """The messages of earlier rounds whose replies still count.

    Args:
        config: The run config.
    """

    def __init__(self, config: RunConfig) -> None:
        self._config = config
        self._waiting: dict[str, Waiting] = {}

    @property
    def messages(self) -> list[Message]:
        """The messages that are waited for."""
        return [one.message for one in self._waiting.values()]

    def begin_round(self, before: Sequence[int], population: Sequence[int]) -> None:
        """Forget messages whose replies may not, or can no longer, count.

        Args:
            before: Node ids of all clients in the round before.
            population: Node ids of all clients from now on.
        """
        oldest = time.monotonic() - self._config.strategy.reply_seconds
        may_be_twice = self._config.privacy.unit != "none" and before != population
        nodes = set() if may_be_twice else set(population)
        self._waiting = {
            message_id: one
            for message_id, one in self._waiting.items()
            if one.sent_at > oldest and one.message.metadata.dst_node_id in nodes
        }

    def stream(
        self, grid: Grid, messages: list[Message], is_enough: Callable[[], bool]
    ) -> ReplyStream:
        """Send a round's messages, and return the stream of its replies and the late ones."""
        return ReplyStream(
            grid,
            messages,
            self._config.strategy.round_timeout,
            self._waiting,
            waits_for_late=self._config.privacy.unit != "none",
            is_enough=is_enough,
        )

    def end_round(self, replies: ReplyStream) -> None:
        """Keep what a round leaves unanswered, if it may count later."""
        if self._config.strategy.late_replies == "next-round":
            self._waiting = replies.unanswered()
