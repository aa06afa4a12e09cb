"""The ledger of a run with record level and one noise for the whole federation."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from fedllm.privacy.accounting import (
    noise_to_signal,
    record_accountant,
    record_epsilon,
)
from fedllm.privacy.group_privacy import group_epsilon
from fedllm.privacy.protected_record import persons_not_covered, protected, relation
from fedllm.privacy.release_ledger import ReleaseLedger, bounded
from fedllm.privacy.sealed_claims import (
    opened_by_trustees,
    sealed_not_covered,
    whom_sealed,
)
from fedllm.privacy.sealed_sum import deviation
from fedllm.privacy.wording import delta_caution, plain, strength

_TRUSTED_SERVER = (
    "the server, which sees each client's sum of clipped gradients before the noise, and adds "
    "the noise: neither a client nor its ledger can verify that it does"
)
_PINNED_CODE = (
    "the code that a client runs: Flower ships it from the server, so a node should pin or "
    "sign it"
)
_NOT_COVERED = [
    "how many rows each client declared, and so the sampling probability: public numbers, "
    "fixed before round 1, of which a row that joins or leaves changes none",
    "rows declared public, if a client trains on them: their losses, and the choice of a "
    "round by them, have no noise",
    "time and memory: how long a client takes, and whether it passes the run's time limit or "
    "ends for want of memory, depends on how long its rows are; a client that gives no sum "
    "counts as zero in that step{tells}",
    "a file that is read as a whole (.json, .csv, .parquet) and is malformed as a whole: "
    "{malformed}, also where one row is the cause; a broken line of .jsonl is a record",
    "the kernels of a GPU: that a record's gradient is the same in any company was tested on "
    "CPUs, and is tried by each client on its own device, on public tokens only",
    "who is connected, which client gave no {reply}, and when each client answers (timing)",
    "a run's traffic and its clients' seconds so far, which Flower shows to each registered "
    "node that asks",
    "the choice of settings, where it was made on private data",
    "earlier and later runs over the same rows: their epsilons add up (each node's own ledger "
    "counts them)",
    "in a simulation: that partitions by label ('dirichlet', 'natural') have sizes that depend "
    "on rows, and stand as declared",
]


_OPEN_WORDS = {
    "tells": " (codes time-limit, out-of-memory, failed, or no answer)",
    "malformed": "the code is no-data",
    "reply": "sum and by which code",
}
_SEALED_WORDS = {
    "tells": ", which the opened sum tells of under its noise",
    "malformed": "its client's sums are zero",
    "reply": "reply",
}


@dataclass(frozen=True)
class JointSettings:
    """The settings that a run promises, fixed before round 1; fields as in `PrivacySettings`.

    Attributes:
        unit: `record`.
        noise: `joint`.
        declared_rows: The rows that each client declared, in the order of the population;
            the persons, if there is a `person_column`.
        expected_batch_size: B: the expected number of records of one step in the whole
            federation, and the divisor of its sum.
        max_grad_norm: Largest norm of one record's gradient.
        start_note: What is not counted of the adapter that the run starts from.
        person_column: Column by which all rows of one person in one client are one record;
            empty: each row is one.
        trustees: k, the most that open a step; 0: the server adds the noise.
        colluding: c, how many of them may tell the server theirs.
    """

    unit: str
    noise: str
    sampling: str
    population_size: int
    num_sampled_clients: float
    declared_rows: Sequence[int]
    expected_batch_size: int
    max_grad_norm: float
    noise_multiplier: float
    delta: float
    target_epsilon: float
    max_epsilon: float
    num_trainable: int
    planned_rounds: int
    start_note: str = ""
    person_column: str = ""
    trustees: int = 0
    colluding: int = 0

    def __post_init__(self) -> None:
        # A list, as JSON has it, would not equal a tuple.
        rows = tuple(int(count) for count in self.declared_rows)
        object.__setattr__(self, "declared_rows", rows)
        # The ledger of a run from before there were trustees has null for both.
        for name in ("trustees", "colluding"):
            object.__setattr__(self, name, getattr(self, name) or 0)

    @property
    def total_rows(self) -> int:
        """The rows, or persons, that all clients declared together."""
        return sum(self.declared_rows)

    @property
    def sampling_probability(self) -> float:
        """q: the probability of each record to be in a step."""
        return self.expected_batch_size / self.total_rows

    @property
    def opened_noise(self) -> float:
        """The noise of a released sum over G: of all trustees together, else z."""
        if not self.trustees:
            return self.noise_multiplier
        return deviation(self.noise_multiplier, self.trustees, self.colluding)


class JointLedger(ReleaseLedger[JointSettings]):
    """The steps of one run. Make it with `create` or `load`.

    Guarantee:
        As `ReleaseLedger`. A release is one Poisson-subsampled Gaussian mechanism over the
        records of all clients, with noise multiplier z and probability q.
    """

    settings_type = JointSettings
    positive = (
        "population_size",
        "total_rows",
        "expected_batch_size",
        "max_grad_norm",
        "noise_multiplier",
        "num_trainable",
        "planned_rounds",
    )
    derived = (
        "num_rounds",
        "sampling_probability",
        "epsilon",
        "epsilon_two_clients",
        "epsilon_adapters",
    )

    def spent_after(self, num_releases: int) -> float:
        """Return the epsilon of a number of steps, add-or-remove of one record."""
        return record_epsilon(self._events(num_releases), self.settings.delta)

    @property
    def epsilon_of_adapters(self) -> float:
        """The epsilon spent so far against an observer of the adapters alone."""
        settings, count = self.settings, len(self._releases)
        event = (settings.opened_noise, settings.sampling_probability, count)
        return record_epsilon([event], settings.delta)

    @property
    def two_clients(self) -> float | None:
        """The epsilon of a person with rows at two clients; None if a record is a row."""
        settings, count = self.settings, len(self._releases)
        if not settings.person_column:
            return None
        (event,) = self._events(count)
        return group_epsilon(event, settings.delta, 2)

    @property
    def noise_to_signal(self) -> float:
        """R: the norm of the averaged noise over the largest norm of a gradient."""
        settings = self.settings
        return noise_to_signal(
            settings.opened_noise,
            settings.num_trainable,
            settings.expected_batch_size,
        )

    def strength(self, epsilon: float) -> str:
        """Return the word for an epsilon at this run's delta and number of rows."""
        return strength(epsilon, self.settings.delta, self.settings.total_rows)

    def as_dict(self) -> dict[str, Any]:
        """Return the content of privacy.json, with every key that other units have."""
        settings, spent = self.settings, self.spent
        events = self._events(len(self._releases))
        return {
            "run": self.run,
            **asdict(settings),
            "total_rows": settings.total_rows,
            "clipping_norm": None,
            "earlier_mu_squared": None,
            "epsilon_adapters": (
                bounded(self.epsilon_of_adapters) if settings.trustees else None
            ),
            "neighbouring_relation": relation(settings.person_column),
            "epsilon": bounded(spent),
            "epsilon_two_clients": bounded(self.two_clients),
            "epsilon_replace_one": None,
            "sampling_probability": settings.sampling_probability,
            "num_rounds": len(self._releases),
            "releases": self._releases,
            "chain": self._links,
            "noise_to_signal": self.noise_to_signal,
            "noise_probe": self._noise_probe,
            "accountant": record_accountant(events, settings.delta),
            "not_covered": self._not_covered(),
            "strength": self.strength(spent),
            "statement": self._statement(spent),
        }

    def _events(self, num_releases: int) -> list[tuple[float, float, int]]:
        settings = self.settings
        q = settings.sampling_probability
        return [(settings.noise_multiplier, q, num_releases)]

    def _not_covered(self) -> list[str]:
        """Return what the bound leaves out, the server first."""
        settings, column = self.settings, self.settings.person_column
        own = persons_not_covered(column)
        same = [] if column else ["the same row at several clients"]
        start = filter(None, [settings.start_note])
        if settings.trustees:
            first, words = sealed_not_covered(settings.colluding), _SEALED_WORDS
        else:
            first, words = [_TRUSTED_SERVER, _PINNED_CODE], _OPEN_WORDS
        rest = [text.format_map(words) for text in _NOT_COVERED]
        return [*first, *own, *rest, *same, *start]

    def _statement(self, spent: float) -> str:
        """Return the privacy statement, one sentence."""
        settings = self.settings
        caution = delta_caution(settings.delta, settings.total_rows)
        because = f", since {caution}" if caution else ""
        two = self.two_clients
        group = (
            ""
            if two is None
            else f" (epsilon {plain(two)} for a person with rows at two clients)"
        )
        whom, rest = self._whom_and_rest()
        return (
            f"Record-level differential privacy with epsilon {plain(spent)} at delta "
            f"{settings.delta:g} (protection: {self.strength(spent)}{because}): for {whom} "
            f"this run released in {len(self._releases)} steps, each record drawn by its client's secret coin of "
            f"probability {settings.sampling_probability:.3g}, whether "
            f"{protected(settings.person_column)} was there or not changes the probability "
            f"of any conclusion by at most a factor of e^{plain(spent)}, plus "
            f"{settings.delta:g}{group}; {rest}"
        )

    def _whom_and_rest(self) -> tuple[str, str]:
        """Return against whom the epsilon is, and how the statement ends."""
        settings = self.settings
        if not settings.trustees:
            return "whoever sees only the adapters that", (
                "the server, which receives each client's sum of clipped gradients and adds "
                "one noise to the sum of all, is trusted, and what is not covered is listed "
                "beside this under not_covered."
            )
        parties = (settings.trustees, settings.colluding)
        adapters = plain(self.epsilon_of_adapters)
        return whom_sealed(*parties), opened_by_trustees(adapters, *parties)
