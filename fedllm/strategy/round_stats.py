"""Counts, failures and sizes of one round."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass
class Round:
    """Counts, failures and sizes of one round, for the log and metrics.jsonl.

    Attributes:
        asked: Clients that were sent the adapter.
        answered: Replies that came, usable or not.
        late: Those of them that answer a message of an earlier round.
        rejected: (node id, code, text) of each reply without a usable update.
        train_loss: Mean training loss weighted by examples; None under DP.
        client_seconds: Phase -> seconds, summed over the clients that report theirs;
            empty under DP.
        num_timed: Number of those clients.
        epsilons: Node id -> the epsilon that a client reports for its records.
        bytes_down: Bytes of adapter arrays sent.
        bytes_up: Bytes of adapter arrays received.
    """

    asked: int = 0
    answered: int = 0
    late: int = 0
    rejected: list[tuple[int, str, str]] = field(default_factory=list)
    train_loss: float | None = None
    client_seconds: dict[str, float] = field(default_factory=dict)
    num_timed: int = 0
    epsilons: dict[int, float | None] = field(default_factory=dict)
    bytes_down: int = 0
    bytes_up: int = 0

    @property
    def usable(self) -> int:
        """Replies whose update counts."""
        return self.answered - len(self.rejected)

    def note_seconds(self, seconds: Mapping[str, float]) -> None:
        """Add one client's seconds to the sums."""
        self.num_timed += 1
        for phase, value in seconds.items():
            self.client_seconds[phase] = self.client_seconds.get(phase, 0.0) + value

    @property
    def all_spent(self) -> bool:
        """Whether every client that was asked answered that its budget is spent."""
        codes = [code for _, code, _ in self.rejected]
        return bool(codes) and codes == ["budget-spent"] * self.asked
