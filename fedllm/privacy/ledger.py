"""The ledger of a run: privacy.json, on disk before anything is released."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from fedllm.atomic_files import write_atomic
from fedllm.errors import PrivacyError
from fedllm.privacy.accounting import Epsilons, Sampling, epsilons, noise_to_signal
from fedllm.privacy.released_rounds import ReleasedRounds
from fedllm.privacy.wording import delta_caution, plain, strength

_NOT_COVERED = [
    "the server, which sees each client's update before it is clipped",
    "whether a client is among those of the run at all: their number is published",
    "rows declared public, if a client trains on them: their losses, and the choice of a "
    "round by them, have no noise",
    "a run's traffic and its clients' seconds so far, which Flower shows to each registered "
    "node that asks",
    "the choice of settings, where it was made on private data",
    "who is connected, when each client answers (timing), and, where cohorts are not "
    "secret, which clients gave no usable update and by which code",
    "earlier and later runs over the same clients, which add up: a node with max-epsilon "
    "counts what they promise and stops (fedllm node budget); no node sees whether a server "
    "adds that noise, against which only updates that it cannot read would help",
    "a client with several nodes: the bound is for one node",
]
_DERIVED = (
    "num_rounds",
    "sampling_probability",
    "epsilon",
    "epsilon_replace_one",
)
_SAMPLING_WORDS = {
    "all": "all {size} clients in each",
    "fixed": "{n:g} of {size} clients in each, no amplification claimed",
    "poisson": "each of {size} clients by its own secret coin of probability {q:.3g}",
}


@dataclass(frozen=True)
class PrivacySettings:
    """The privacy settings that a run promises, fixed before round 1.

    Attributes:
        unit: `client`.
        sampling: `all`, `fixed` or `poisson`.
        population_size: Clients N.
        num_sampled_clients: n, the divisor of the sum: q*N under `poisson`.
        clipping_norm: C.
        noise_multiplier: z.
        delta: Delta.
        target_epsilon: The epsilon that z was calibrated to; 0.0: z was given.
        max_epsilon: The epsilon at which training stops; 0.0: no limit.
        num_trainable: d.
        planned_rounds: Rounds that z was calibrated for.
    """

    unit: str
    sampling: Sampling
    population_size: int
    num_sampled_clients: float
    clipping_norm: float
    noise_multiplier: float
    delta: float
    target_epsilon: float
    max_epsilon: float
    num_trainable: int
    planned_rounds: int


class Ledger:
    """The releases of one run. Make it with `create` or `load`.

    Guarantee:
        A release is on disk, file and folder synced, before `spend` returns; a crash
        afterwards loses the round, never its cost. With `target_epsilon` no more
        releases are admitted than it was calibrated for. After `follow` no copy of the
        run folder releases a round that another copy has released.
    """

    def __init__(
        self,
        path: Path,
        settings: PrivacySettings,
        releases: list[int],
        noise_probe: Mapping[str, float] | None,
        run: str = "",
    ) -> None:
        self.settings = settings
        self.run = run
        self._path = path
        self._releases = releases
        self._noise_probe = noise_probe
        self._released: ReleasedRounds | None = None

    @classmethod
    def create(cls, path: Path, settings: PrivacySettings, run: str = "") -> "Ledger":
        """Start a ledger on disk.

        Args:
            path: The file.
            settings: The privacy settings that the run promises.
            run: Name of the run.

        Raises:
            PrivacyError: The file exists already.
        """
        if path.exists():
            raise PrivacyError(
                f"{path}: there is a ledger already; a run keeps its own"
            )
        ledger = cls(path, settings, [], None, run)
        ledger._write()
        return ledger

    @classmethod
    def load(cls, path: Path) -> "Ledger":
        """Load the ledger of a run that is resumed.

        Raises:
            PrivacyError: It is missing or damaged, or its numbers contradict each other:
                nothing may be released without it.
        """
        try:
            content = json.loads(path.read_text("utf-8"))
            values = {f.name: content[f.name] for f in fields(PrivacySettings)}
            settings = PrivacySettings(**values)
            releases = [int(r) for r in content["releases"]]
            run = str(content.get("run", ""))
            ledger = cls(path, settings, releases, content["noise_probe"], run)
            edited = ledger._contradiction(content)
        except (OSError, ValueError, KeyError, TypeError, ArithmeticError) as error:
            raise PrivacyError(f"{path}: the ledger cannot be read: {error}") from None
        if edited is not None:
            raise PrivacyError(f"{path}: the ledger was edited: {edited}")
        return ledger

    def check_same(self, settings: PrivacySettings) -> None:
        """Raise if the settings of a resumed run have changed.

        Raises:
            PrivacyError: Each setting that differs, with both values.
        """
        old, new = asdict(self.settings), asdict(settings)
        changed = [
            f"{key} was {old[key]!r} and is now {new[key]!r}"
            for key in old
            if not _alike(old[key], new[key])
        ]
        if changed:
            raise PrivacyError("privacy settings have changed: " + "; ".join(changed))

    def follow(self, released: ReleasedRounds) -> list[int]:
        """Enter what other copies of the run folder released, and each release there too.

        Args:
            released: The file that all copies of the run folder share.

        Returns:
            The rounds that were not in this ledger: they count as spent.

        Raises:
            PrivacyError: The file is missing or damaged, or this one cannot be written.
        """
        missing = sorted(set(released.read()) - set(self._releases))
        if missing:
            self._releases = sorted([*self._releases, *missing])
            self._write()
        self._released = released
        return missing

    def spend(self, server_round: int) -> None:
        """Enter a round's release.

        Raises:
            PrivacyError: The round was released before, here or by another copy of the
                run folder, the budget is spent, or it cannot be written; then nothing
                may be released.
        """
        if server_round in self._releases:
            raise PrivacyError(f"round {server_round} was released already")
        if not self.may_spend(self.settings.max_epsilon):
            raise PrivacyError("one more release would pass the budget")
        known = self.releases
        self._releases.append(server_round)
        try:
            self._write()
        except BaseException:
            self._releases.pop()
            raise
        if self._released is not None:
            self._released.add(server_round, known)

    def may_spend(self, max_epsilon: float) -> bool:
        """Return whether one more release keeps max_epsilon (0.0: not set) and the target."""
        settings = self.settings
        more = len(self._releases) + 1
        if settings.target_epsilon > 0 and more > settings.planned_rounds:
            return False
        return max_epsilon == 0 or self.epsilon_after(more).zero_out <= max_epsilon

    def epsilons(self) -> Epsilons:
        """Return the epsilons spent so far."""
        return self.epsilon_after(len(self._releases))

    def epsilon_after(self, num_releases: int) -> Epsilons:
        """Return the epsilons of a number of releases."""
        settings = self.settings
        return epsilons(
            settings.noise_multiplier,
            num_releases,
            settings.delta,
            settings.sampling,
            self.sampling_probability,
        )

    @property
    def releases(self) -> list[int]:
        """The rounds released so far."""
        return list(self._releases)

    @property
    def sampling_probability(self) -> float:
        """q: each client's probability of being in a round."""
        return self.settings.num_sampled_clients / self.settings.population_size

    def strength(self, epsilon: float) -> str:
        """Return the word for an epsilon at this run's delta and number of clients."""
        settings = self.settings
        return strength(epsilon, settings.delta, settings.population_size)

    def note_probe(self, probe: Mapping[str, float]) -> None:
        """Record what noise alone did to the loss on public rows."""
        self._noise_probe = dict(probe)
        self._write()

    def as_dict(self) -> dict[str, Any]:
        """Return the content of privacy.json; an unbounded epsilon is None."""
        settings, spent = self.settings, self.epsilons()
        epsilon = _bounded(spent.zero_out)
        not_covered = list(_NOT_COVERED)
        if settings.sampling == "poisson":
            not_covered.append(
                "the other clients: by a run's traffic and seconds, which Flower shows them, "
                "the size of a cohort is no secret from them, and for them the epsilon "
                "without amplification holds"
            )
            not_covered.append(
                "Flower's own log and database, which know each cohort and are trusted "
                "with the server (`flwr list --run-id` prints a run's traffic and its "
                "clients' seconds), and the times of the run's files and a tracker's "
                "start and end, which tell how long cohorts took"
            )
        return {
            "run": self.run,
            **asdict(settings),
            "neighbouring_relation": "zero-out",
            "epsilon": epsilon,
            "epsilon_replace_one": _bounded(spent.replace_one),
            "sampling_probability": self.sampling_probability,
            "num_rounds": len(self._releases),
            "releases": self._releases,
            "noise_to_signal": noise_to_signal(
                settings.noise_multiplier,
                settings.num_trainable,
                settings.num_sampled_clients,
            ),
            "noise_probe": self._noise_probe,
            "accountant": spent.accountant,
            "not_covered": not_covered,
            "strength": self.strength(spent.zero_out),
            "statement": self._statement(spent),
        }

    def _contradiction(self, content: Mapping[str, Any]) -> str | None:
        """Return the first number of a file that contradicts its settings and rounds."""
        releases, settings = self._releases, self.settings
        if releases != content["releases"] or releases != sorted(set(releases)):
            return f"releases are {content['releases']!r}"
        if releases and releases[0] < 1:
            return f"releases are {releases!r}"
        positive = (
            "population_size",
            "num_sampled_clients",
            "clipping_norm",
            "noise_multiplier",
            "num_trainable",
            "planned_rounds",
        )
        for name in positive:
            if not 0 < getattr(settings, name) < math.inf:
                return f"{name} is {getattr(settings, name)!r}"
        if not 0 < settings.delta < 1:
            return f"delta is {settings.delta!r}"
        derived = self.as_dict()
        for name in _DERIVED:
            stated, true = content[name], derived[name]
            if stated is None or true is None:
                same = stated is true
            else:
                # Another version of SciPy may round the last digits differently.
                same = math.isclose(stated, true, rel_tol=1e-6, abs_tol=1e-9)
            if not same:
                return f"{name} is {stated!r}, but settings and rounds give {true!r}"
        return None

    def _statement(self, spent: Epsilons) -> str:
        """Return the privacy statement, one sentence."""
        settings = self.settings
        words = _SAMPLING_WORDS[settings.sampling].format(
            size=settings.population_size,
            n=settings.num_sampled_clients,
            q=self.sampling_probability,
        )
        zero_out, replace_one = plain(spent.zero_out), plain(spent.replace_one)
        caution = delta_caution(settings.delta, settings.population_size)
        because = f", since {caution}" if caution else ""
        return (
            "Client-level differential privacy with epsilon "
            f"{zero_out} at delta {settings.delta:g} (protection: "
            f"{self.strength(spent.zero_out)}{because}): for whoever sees only the adapters "
            f"that this run released in {len(self._releases)} rounds, {words}, whether one client "
            "took part or sent nothing changes the probability of any conclusion by at "
            f"most a factor of e^{zero_out}, plus {settings.delta:g} (replace-one: "
            f"e^{replace_one}, where that client had other data instead); the server, which "
            "receives each client's update, is trusted, and what is not covered is "
            "listed beside this under not_covered."
        )

    def _write(self) -> None:
        try:
            write_privacy_file(self._path, self.as_dict())
        except PrivacyError as error:
            raise PrivacyError(f"{error}; nothing is released") from None


def write_privacy_file(path: Path, content: Mapping[str, Any]) -> None:
    """Write privacy.json whole, so that it survives a power cut.

    Raises:
        PrivacyError: It cannot be written.
    """
    text = json.dumps(content, indent=2, allow_nan=False) + "\n"
    try:
        write_atomic(path, text.encode())
    except OSError as error:
        raise PrivacyError(f"{path}: cannot be written: {error.strerror}") from None


def no_privacy(
    population_size: int, num_trainable: int, run: str = ""
) -> dict[str, Any]:
    """Return privacy.json of a run without privacy: epsilon is None, not 0."""
    empty = dict.fromkeys(f.name for f in fields(PrivacySettings))
    return {
        "run": run,
        **empty,
        "unit": "none",
        "population_size": population_size,
        "num_trainable": num_trainable,
        "neighbouring_relation": None,
        "epsilon": None,
        "epsilon_replace_one": None,
        "sampling_probability": None,
        "num_rounds": 0,
        "releases": [],
        "noise_to_signal": None,
        "noise_probe": None,
        "accountant": None,
        "not_covered": ["everything: no noise was added"],
        "strength": strength(None),
        "statement": "No differential privacy: no noise was added, and what the adapter "
        "tells about a client's data is not bounded.",
    }


def _alike(old: Any, new: Any) -> bool:
    """Return whether two settings are equal but for SciPy's last digits."""
    if isinstance(old, float) and isinstance(new, float):
        return math.isclose(old, new, rel_tol=1e-9)
    return bool(old == new)


def _bounded(value: float | None) -> float | None:
    """Return None for an infinite epsilon, which JSON cannot hold."""
    return value if value is not None and math.isfinite(value) else None
