"""The replies of a round, one at a time, as they arrive."""

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from flwr.app import Error, Message, RecordDict
from flwr.serverapp import Grid

from fedllm.server.local_grid import LocalGrid
from fedllm.wire.messages import UNREADABLE

logger = logging.getLogger(__name__)

_SECONDS_BETWEEN_LINES = 5.0

# A simulation that looks for a message to one node goes through all that are stored, and
# blocks every other caller. Enough for all actors of a machine to have work.
_STORED_IN_SIMULATION = max(64, 4 * (os.cpu_count() or 1))

# A reply that takes longer to fetch is fetched on beside the others.
_PATIENCE = 15.0


class _Fetch(threading.Thread):
    """Fetches and inflates the reply to one message, however long that takes.

    Flower fetches a reply object by object and waits for those that its sender has not
    sent yet, without a limit of ours: a call of its own thread can be left behind.
    """

    def __init__(self, grid: Grid, message_id: str) -> None:
        super().__init__(daemon=True)
        self._grid = grid
        self._message_id = message_id
        self.found: RecordDict | Error | None = None
        self.stop: BaseException | None = None
        """What ends the run, such as an interrupt, to be raised by the caller."""

    def run(self) -> None:
        """Find the reply; None while there is none.

        One that cannot even be inflated, for memory or for hostile bytes, is an error
        that says so.
        """
        try:
            replies = list(self._grid.pull_messages([self._message_id]))
            if replies:
                reply = replies[0]
                self.found = reply.error if reply.has_error() else reply.content
        except (ConnectionError, TimeoutError):
            return
        except Exception as error:  # noqa: BLE001 - hostile bytes must not stop a round
            reason = f"the reply could not be read: {type(error).__name__}"
            self.found = Error(UNREADABLE, reason)
        except BaseException as stop:  # noqa: BLE001 - raised again by the caller
            self.stop = stop


@dataclass(frozen=True)
class Waiting:
    """A message that a client has not answered.

    Attributes:
        message: The message.
        sent_at: `time.monotonic()` when it was sent.
        fetch: The fetch of its reply that is under way, if one is.
    """

    message: Message
    sent_at: float
    fetch: _Fetch | None = None


class ReplyStream:
    """Replies of one round, yielded as they arrive.

    Iterating asks for one message id a call, since Grid inflates all that it is asked
    for; so at most one reply is in memory, but for those that are slow to fetch. Each
    message is answered at most once.

    Guarantee:
        Who replied is who was asked. A reply bears its own metadata, which a client
        writes and the SuperLink does not hold against the sender, so none of it is
        kept: under another node's name it would take that node's place.

    Args:
        grid: Flower's way to the clients.
        messages: The round's messages.
        timeout: Seconds until the round is closed.
        late: Id -> message of an earlier round whose reply counts in this one.
        waits_for_late: Whether the round stays open for those: then which replies count is
            decided by the time limit alone, since it closes earlier only if none can come.
            Otherwise it closes once its own messages are answered.
        is_enough: Asked after each reply; closes the round.
    """

    def __init__(
        self,
        grid: Grid,
        messages: list[Message],
        timeout: float,
        late: Mapping[str, Waiting] = MappingProxyType({}),
        waits_for_late: bool = False,
        is_enough: Callable[[], bool] = lambda: False,
    ) -> None:
        self._grid = grid
        self._timeout = timeout
        self._started = time.monotonic()
        self._unsent = deque(messages)
        # A real client that hangs must not keep its place from the others.
        simulated = type(grid).__name__ == "InMemoryGrid"
        self._most = _STORED_IN_SIMULATION if simulated else len(messages)
        self._in_process = isinstance(grid, LocalGrid)
        self._asked = len(messages)
        self._late = dict(late)
        # With nobody to ask, a round is there for the late ones.
        self._waits_for_late = waits_for_late or not messages
        self._is_enough = is_enough
        self._pending: dict[str, Waiting] = {}
        self._send()
        self._fetching = {i: w.fetch for i, w in late.items() if w.fetch is not None}
        self._title: str | None = None
        self.seconds = 0.0
        """Seconds spent waiting for clients, as opposed to aggregating."""

    def show_progress(self, server_round: int, num_rounds: int) -> None:
        """Log how many clients have answered; not for cohorts that are secret."""
        self._title = f"round {server_round}/{num_rounds}"

    def _send(self) -> None:
        """Send as many messages as may be without a reply."""
        while self._unsent and len(self._pending) < self._most:
            room = min(self._most - len(self._pending), len(self._unsent))
            sent = [self._unsent.popleft() for _ in range(room)]
            ids = self._grid.push_messages(sent)
            for message_id, message in zip(ids, sent, strict=False):
                if message_id is not None:
                    self._pending[message_id] = Waiting(message, time.monotonic())

    def __iter__(self) -> Iterator[Message]:
        """Yield replies until all are there or the time is up."""
        pause, answered, logged = 0.05, 0, self._started
        while self._is_open():
            arrived = False
            for message_id, waiting in [*self._pending.items(), *self._late.items()]:
                began = time.monotonic()
                content = self._pull(message_id)
                self.seconds += time.monotonic() - began
                if content is None:
                    continue
                is_own = self._pending.pop(message_id, None) is not None
                self._late.pop(message_id, None)
                arrived = True
                answered += is_own
                yield Message(content, reply_to=waiting.message)
                del content
                if self._is_enough():
                    return
                now = time.monotonic()
                if (
                    self._title
                    and is_own
                    and (
                        answered == 1
                        or answered == self._asked
                        or now - logged > _SECONDS_BETWEEN_LINES
                    )
                ):
                    self._log_progress(answered, now)
                    logged = now
            self._send()
            left = self._started + self._timeout - time.monotonic()
            if left <= 0 or not self._is_open():
                return
            pause = 0.05 if arrived else min(1.0, pause * 1.5)
            time.sleep(min(pause, left))
            self.seconds += min(pause, left)

    def unanswered(self) -> dict[str, Waiting]:
        """Return id -> message that was sent, in this round or before, and not answered."""
        waiting = {**self._late, **self._pending}
        return {
            message_id: replace(one, fetch=self._fetching.get(message_id))
            for message_id, one in waiting.items()
        }

    def _is_open(self) -> bool:
        """Return whether a reply may come for which the round is kept open."""
        return bool(self._pending) or (self._waits_for_late and bool(self._late))

    def _log_progress(self, answered: int, now: float) -> None:
        """Log how many answered, and how long the others may take."""
        passed = now - self._started
        left = passed * (self._asked - answered) / answered
        # Later replies do not count.
        left = min(left, max(self._timeout - passed, 0.0))
        logger.info(
            "%s: client %d of %d answered after %.0f s%s",
            self._title,
            answered,
            self._asked,
            passed,
            f", about {left:.0f} s left" if answered < self._asked else "",
        )

    def _pull(self, message_id: str) -> RecordDict | Error | None:
        """Return what came in reply to one message; None while there is nothing."""
        fetch = self._fetching.pop(message_id, None)
        if fetch is None:
            fetch = _Fetch(self._grid, message_id)
            if self._in_process:
                # The client trains in this call. In a thread that is left behind it
                # would share its model with the next client, and outlive an interrupt.
                fetch.run()
            else:
                fetch.start()
                fetch.join(_PATIENCE)
        if fetch.is_alive():
            self._fetching[message_id] = fetch
            return None
        if fetch.stop is not None:
            raise fetch.stop
        return fetch.found
