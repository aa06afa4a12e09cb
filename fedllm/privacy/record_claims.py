"""The clients' claims of a run with record-level privacy: privacy.json on the server."""

import json
import math
import statistics
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from fedllm.errors import PrivacyError
from fedllm.privacy.accounting import Sampling
from fedllm.privacy.chain import Chain, Head, chain_fault, read_chain
from fedllm.privacy.protected_record import persons_not_covered, protected, relation
from fedllm.privacy.release_ledger import write_privacy_file
from fedllm.privacy.wording import delta_caution, plain, rounds_text, strength

_NOT_COVERED = [
    "each client's word: epsilon is what the clients report, and the server cannot check",
    "an update that came too late, or that the server could not read: its client has paid "
    "for it, and says so only with its next update",
    "rows declared public, if a client trains on them: their losses, and the choice of a "
    "round by them, have no noise",
    "the number of records of each client, usable or not, which is public by assumption, and "
    "with it the sampling probability, its noise and the epsilon that it reports",
    "time and memory: how long a client takes, and whether it passes the run's time limit or "
    "its own memory (codes time-limit, out-of-memory, failed, or no answer), depends on how "
    "long its rows are; after three requests without an update a client gives one answer for "
    "the rest of that run, and another run begins a new count",
    "a file that is read as a whole (.json, .csv, .parquet) and is malformed as a whole: the "
    "code is no-data, also where one row is the cause; a broken line of .jsonl is a record",
    "the kernels of a GPU: that a record's gradient is the same in any company was tested on "
    "CPUs, and is tried by each client on its own device, on public tokens only",
    "the code that a client runs: Flower ships it from the server, so a node should pin or "
    "sign it",
    "who is connected, which client gave no update and by which code, and when each client "
    "answers (timing)",
    "the choice of settings, where it was made on private data",
    "the same row in the ledger of another client, or under another FEDLLM_HOME",
    "in a simulation, earlier and later runs: virtual clients begin anew in each; and that "
    "partitions by label ('dirichlet', 'natural') have sizes that depend on rows",
]

# A hundred times what Flower was measured with; a file that says more is damaged.
_MOST_CLIENTS = 1_000_000


@dataclass(frozen=True)
class RecordSettings:
    """The settings that a run promises, fixed before round 1; fields as in `PrivacySettings`.

    Attributes:
        max_grad_norm: Largest norm of one record's gradient.
        noise_multiplier: z if it is given; None if each client calibrates its own.
        delta: Upper bound of the clients' deltas.
        person_column: Column by which all rows of one person in one client are one record;
            empty: each row is one.
    """

    unit: str
    sampling: Sampling
    population_size: int
    num_sampled_clients: float
    max_grad_norm: float
    noise_multiplier: float | None
    delta: float
    target_epsilon: float
    max_epsilon: float
    num_trainable: int
    planned_rounds: int
    start_note: str = ""
    person_column: str = ""


class RecordClaims:
    """The claims of a run's clients, on disk after every round.

    Guarantee:
        The epsilon of the run is the largest that any client claimed in any round. It is
        None as long as none did, and if one sent an update without a claim.

    Args:
        path: The file, privacy.json.
        settings: The settings that the run promises.
        run: Name of the run.
    """

    def __init__(self, path: Path, settings: RecordSettings, run: str = "") -> None:
        self.settings = settings
        self.run = run
        self._path = path
        self._claims: dict[int, float] = {}
        # Claims from before a crash, of nodes whose ids may be gone; the smallest first.
        self._earlier: list[float] = []
        self._floor = 0.0
        self._releases: list[int] = []
        self._chain: Chain | None = Chain(run, settings)

    @classmethod
    def create(
        cls, path: Path, settings: RecordSettings, run: str = ""
    ) -> "RecordClaims":
        """Start the claims on disk."""
        claims = cls(path, settings, run)
        claims._write()
        return claims

    @classmethod
    def load(cls, path: Path, settings: RecordSettings) -> "RecordClaims":
        """Load the claims of a run that is resumed.

        The file has the number of claims, their maximum and their median. As many values that
        agree with these stand for the clients' claims, until each client claims again.

        Raises:
            PrivacyError: It is missing, damaged, or of other settings.
        """
        try:
            content = json.loads(path.read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise PrivacyError(f"{path}: cannot be read: {error}") from None
        return cls.of_content(path, content, settings)

    @classmethod
    def of_content(
        cls, path: Path, content: Any, settings: RecordSettings
    ) -> "RecordClaims":
        """Make the claims of a file's content.

        Raises:
            PrivacyError: As `load`.
        """
        try:
            content = dict(content)
            # The start adapter may be gone, and is not looked at again.
            note = str(content.setdefault("start_note", ""))
            settings = replace(settings, start_note=note)
            claims = cls(path, settings, str(content["run"]))
            claims._releases = [int(r) for r in content["releases"]]
            claims._chain = read_chain(claims.run, settings, content)
            count = _count(content["num_clients_reported"])
            worst = _limit(content["epsilon"])
            median = _limit(content["epsilon_median"])
            changed = [
                f"{key} was {content[key]!r} and is now {value!r}"
                for key, value in asdict(settings).items()
                # A file from before there were persons has no column of them.
                if content.get(key, "") != value
            ]
        except (ValueError, KeyError, TypeError, ArithmeticError) as error:
            raise PrivacyError(f"{path}: cannot be read: {error}") from None
        if changed:
            raise PrivacyError("privacy settings have changed: " + "; ".join(changed))
        if fault := claims._contradiction(content["epsilon"]):
            raise PrivacyError(f"{path}: was edited: {fault}")
        middle = min(count, count // 2 + 1)
        claims._earlier = [median] * middle + [worst] * (count - middle)
        claims._floor = worst if count else 0.0
        return claims

    def note_round(
        self,
        server_round: int,
        claims: Mapping[int, float | None],
        population: Collection[int] | None = None,
    ) -> None:
        """Record the clients' claims on disk.

        Args:
            server_round: The round that they took part in.
            claims: Node id -> epsilon; None if an update came without one.
            population: Node ids of this round; a client that is not among them may be back
                under another id. None: as before.
        """
        self._floor = max([self._floor, *self._every])
        if population is not None:
            gone = set(self._claims) - set(population)
            self._earlier = sorted([*self._earlier, *map(self._claims.pop, gone)])
        for node_id, claim in claims.items():
            epsilon = math.inf if claim is None else claim
            if node_id not in self._claims and self._earlier:
                # It replaces one of these; dropping the smallest understates no client.
                self._earlier.pop(0)
            self._claims[node_id] = max(self._claims.get(node_id, 0.0), epsilon)
        if claims:
            self._releases.append(server_round)
            if self._chain is not None:
                self._chain.append(server_round, epsilon=self.worst)
        self._write()

    @property
    def head(self) -> Head | None:
        """The end of the chain of rounds; None: an older version began the file."""
        return None if self._chain is None else self._chain.head

    @property
    def worst(self) -> float | None:
        """The largest epsilon of a client; None if it is not known."""
        return _known(max([*self._every, self._floor])) if self._every else None

    @property
    def median(self) -> float | None:
        """The median epsilon of the clients that took part; None if it is not known."""
        return _known(statistics.median(self._every)) if self._every else None

    @property
    def two_clients(self) -> float | None:
        """The epsilon of a person with rows at two clients, at twice delta.

        Each client has noise and coins of its own, so their bounds add up. None if it is not
        known, or a record is a row.
        """
        worst = self.worst
        return None if worst is None or not self.settings.person_column else 2 * worst

    @property
    def releases(self) -> list[int]:
        """The rounds in which a client sent an update."""
        return list(self._releases)

    def _contradiction(self, epsilon: float | None) -> str | None:
        """Return what contradicts the chain: a link, a round, or the epsilon after it."""
        fault = chain_fault(self._chain, self._releases)
        links = [] if fault or self._chain is None else self._chain.links
        if links and links[-1].get("epsilon") != epsilon:
            return f"epsilon is {epsilon!r}, and its chain has {links[-1]['epsilon']!r}"
        return fault

    @property
    def _every(self) -> list[float]:
        return [*self._earlier, *self._claims.values()]

    def as_dict(self) -> dict[str, Any]:
        """Return the content of privacy.json, with every key that other units have."""
        settings = self.settings
        worst = self.worst
        return {
            "run": self.run,
            **asdict(settings),
            "clipping_norm": None,
            "earlier_mu_squared": None,
            "trustees": None,
            "colluding": None,
            "epsilon_adapters": None,
            "neighbouring_relation": relation(settings.person_column),
            "epsilon": worst,
            "epsilon_two_clients": self.two_clients,
            "epsilon_median": self.median,
            "epsilon_replace_one": None,
            "num_clients_reported": len(self._every),
            "sampling_probability": settings.num_sampled_clients
            / settings.population_size,
            "num_rounds": len(self._releases),
            "releases": self._releases,
            "chain": None if self._chain is None else self._chain.links,
            "noise_to_signal": None,
            "noise_probe": None,
            "accountant": "each client's own: exact Gaussian without sampling, else PLD, or "
            "RDP where PLD does not return (dp-accounting)",
            "not_covered": self._not_covered(),
            "strength": self.strength(math.inf if worst is None else worst),
            "statement": self.statement,
        }

    def _not_covered(self) -> list[str]:
        """Return what the bound leaves out, the server first."""
        own = persons_not_covered(self.settings.person_column)
        start = filter(None, [self.settings.start_note])
        return [*_NOT_COVERED[:2], *own, *_NOT_COVERED[2:], *start]

    def strength(self, epsilon: float) -> str:
        """Return the word for an epsilon at this run's delta.

        How many records each client has is not known here.
        """
        return strength(epsilon, self.settings.delta)

    @property
    def statement(self) -> str:
        """The privacy statement, one sentence."""
        worst, settings = self.worst, self.settings
        if not self._every:
            return (
                "Record-level differential privacy was promised, and no client has "
                "reported what it spent, so epsilon is not known."
            )
        if worst is None:
            return (
                "Record-level differential privacy was promised, and at least one client "
                "sent updates without saying what they cost, so epsilon is not bounded."
            )
        caution = delta_caution(settings.delta)
        because = f", since {caution}" if caution else ""
        two = self.two_clients
        group = (
            ""
            if two is None
            else f" (epsilon {plain(two)} at delta {2 * settings.delta:g} for a person with "
            "rows at two clients)"
        )
        return (
            f"Record-level differential privacy with epsilon {plain(worst)} for the worst "
            f"client and {plain(self.median)} for the median one at delta "
            f"{settings.delta:g} (protection: {self.strength(worst)}{because}), as the {len(self._every)} "
            f"clients that took part in {rounds_text(len(self._releases))} report it: for "
            "anyone who sees all that they sent, the server included, whether "
            f"{protected(settings.person_column)} was there or not changes the probability "
            f"of any conclusion by at most a factor of e^{plain(worst)}, plus "
            f"{settings.delta:g}{group}; the code that a client runs is trusted, and what is not "
            "covered is listed beside this under not_covered."
        )

    def _write(self) -> None:
        write_privacy_file(self._path, self.as_dict())


def _count(value: Any) -> int:
    """Return a file's number of clients, each of which takes memory when it is loaded.

    Raises:
        ValueError: It is no number of clients.
    """
    count = int(value)
    if not 0 <= count <= _MOST_CLIENTS:
        raise ValueError(
            f"num_clients_reported must be from 0 to {_MOST_CLIENTS:,} (got {count})"
        )
    return count


def _limit(value: Any) -> float:
    """Return an epsilon of a file; infinite if it has none."""
    return math.inf if value is None else float(value)


def _known(value: float) -> float | None:
    """Return None for an epsilon that is not bounded."""
    return value if math.isfinite(value) else None
