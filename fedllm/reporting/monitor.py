"""The monitor of a run: its state, its page, a tracker and served numbers, kept up to date.

Nothing here may end a run: a failure is logged in one line, and the run continues.
"""

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from fedllm.reporting.metrics_server import MetricsServer
from fedllm.reporting.report import write_report
from fedllm.reporting.trackers import (
    TrackerName,
    make_tracker,
    numbers,
    require_tracker,
)
from fedllm.runs.state import RunState

logger = logging.getLogger(__name__)

_T = TypeVar("_T")

# The page is redrawn after a round unless that would take more than this of a run's time.
_LARGEST_SHARE = 0.05


class RunMonitor:
    """The monitor of one run.

    Args:
        folder: The run folder.
        tracker: The tracker that its rounds are sent to.
        secret_cohorts: Whether the length of a round is secret. A tracker stamps a round with
            the time, so it then gets all rounds at the end.

    Raises:
        ConfigError: The tracker's package is not installed.
    """

    def __init__(
        self, folder: Path, tracker: TrackerName, secret_cohorts: bool = False
    ) -> None:
        self._folder = folder
        self._secret_cohorts = secret_cohorts
        self._held: list[Mapping[str, Any]] = []
        require_tracker(tracker)
        self._tracker = _harmless(lambda: make_tracker(tracker, folder), "the tracker")
        self._state = _harmless(lambda: RunState(folder), "its state")
        self._metrics: MetricsServer | None = None
        self._seconds = 0.0
        self._not_before = 0.0

    def serve(self, port: int, rounds: int) -> None:
        """Serve the run's numbers to Prometheus until it ends.

        Args:
            port: On 127.0.0.1; 0: nothing is served.
            rounds: Rounds that the run planned.

        Raises:
            ConfigError: The port is in use, or prometheus-client is not installed.
        """
        if port:
            self._metrics = MetricsServer(port, rounds, self._secret_cohorts)

    def note(self, line: Mapping[str, Any]) -> None:
        """Show a round that metrics.jsonl holds."""
        began = time.monotonic()
        if self._secret_cohorts:
            self._held.append(line)
        else:
            self._track(line)
        if (metrics := self._metrics) is not None:
            _harmless(lambda: metrics.note(line), "the served numbers")
        if began >= self._not_before:
            write_report(self._folder)
        ended = time.monotonic()
        if began >= self._not_before:
            self._not_before = ended + (ended - began) / _LARGEST_SHARE
        self._seconds += ended - began

    def take_seconds(self) -> float:
        """Return the seconds that this took since the last call, and start again at 0."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    def finish(self) -> None:
        """Show that the run has finished."""
        if (state := self._state) is not None:
            _harmless(state.finish, "its state")
        self._close()

    def fail(self, error: Exception) -> None:
        """Show the error that stopped the run."""
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        if (state := self._state) is not None:
            _harmless(lambda: state.fail(reason), "its state")
        self._close()

    @contextlib.contextmanager
    def showing_failure(self) -> Iterator[None]:
        """Show an error that leaves the block as the one that stopped the run."""
        try:
            yield
        except Exception as error:
            self.fail(error)
            raise

    def _track(self, line: Mapping[str, Any]) -> None:
        if (tracker := self._tracker) is not None:
            _harmless(
                lambda: tracker.log(line["server_round"], numbers(line)), "the tracker"
            )

    def _close(self) -> None:
        for line in self._held:
            self._track(line)
        self._held.clear()
        if self._tracker is not None:
            _harmless(self._tracker.close, "the tracker")
        if self._metrics is not None:
            _harmless(self._metrics.close, "the served numbers")
            self._metrics = None
        write_report(self._folder)


def _harmless(act: Callable[[], _T], what: str) -> _T | None:
    """Return the result of `act`, or None if it fails: a failure here ends no run."""
    try:
        return act()
    except Exception as error:  # noqa: BLE001 - a failure here ends no run
        text = " ".join(str(error).split())[:200]
        logger.warning("of this run %s is not kept: %s", what, text)
        return None
