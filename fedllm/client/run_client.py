"""One client in one run, and how long its part of a round took."""

import dataclasses
import time
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from fedllm.client.log import ClientLog
from fedllm.client.node_config import NodeConfig
from fedllm.config import RunConfig
from fedllm.wire.messages import CLIENT_PHASES

if TYPE_CHECKING:
    from fedllm.training.result import Trained


@dataclass(frozen=True)
class RunClient:
    """One client in one run."""

    config: RunConfig
    node: NodeConfig
    run_id: int
    attempt: int
    """Flower's id of the run that asks: another than `run_id` once a run was resumed."""

    @property
    def log(self) -> ClientLog:
        """The client's own log."""
        is_shown = self.config.privacy.unit == "none" or not self.node.is_partition
        return ClientLog(self.node.partition_id, self.run_id, is_shown)


@dataclass(frozen=True)
class Times:
    """`time.monotonic()` at each border between two of CLIENT_PHASES."""

    started: float
    loaded: float
    ready: float
    began: float
    trained: float
    encoded: float

    def seconds(self) -> dict[str, float]:
        """Return the seconds of each phase, by the name of its metric."""
        borders = pairwise(dataclasses.astuple(self))
        return {
            f"seconds-{phase}": until - since
            for phase, (since, until) in zip(CLIENT_PHASES, borders, strict=True)
        }


def log_training(
    client: RunClient,
    server_round: int,
    trained: "Trained",
    times: Times,
    created_at: float,
) -> None:
    """Log what a training did and how long it took.

    Args:
        client: Whose log it is.
        server_round: The round.
        trained: The result.
        times: Its times, by this machine's clock.
        created_at: When the server made the message, by the server's clock, which may
            differ from this machine's.
    """
    age = time.time() - (time.monotonic() - times.began) - created_at
    client.log.write(
        f"client {client.node.partition_id}: round {server_round}: "
        f"{trained.num_steps} steps on {trained.num_examples} examples in "
        f"{times.trained - times.ready:.1f} s "
        f"(ready after {times.ready - times.started:.1f} s; first step {age:.1f} s after "
        f"the message was made, {times.began - times.started:.1f} s after it was taken "
        "up)"
    )
    if trained.is_cut:
        client.log.write(
            f"client {client.node.partition_id}: round {server_round}: max-seconds "
            f"{client.node.max_seconds:g} ended the training after {trained.num_steps} steps; "
            "its update counts as any other"
        )
    if trained.num_unfit:
        client.log.write(
            f"client {client.node.partition_id}: round {server_round}: the model could not "
            f"take {trained.num_unfit} of the examples drawn, which added nothing"
        )
