"""A run's ledger of releases that the server noises: privacy.json, whatever the unit."""

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol, Self, TypeVar

from fedllm.atomic_files import write_atomic
from fedllm.errors import PrivacyError
from fedllm.privacy.chain import Chain, Head, chain_fault, read_chain
from fedllm.privacy.released_rounds import ReleasedRounds


class ReleaseSettings(Protocol):
    """What the settings of each unit have: a frozen dataclass of JSON values."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def target_epsilon(self) -> float:
        """The epsilon that z was calibrated to; 0.0: z was given."""

    @property
    def max_epsilon(self) -> float:
        """The epsilon at which training stops; 0.0: no limit."""

    @property
    def planned_rounds(self) -> int:
        """Rounds that z was calibrated for."""

    @property
    def delta(self) -> float:
        """Delta."""


SettingsT = TypeVar("SettingsT", bound=ReleaseSettings)


class ReleaseLedger(ABC, Generic[SettingsT]):
    """The releases of one run. Make it with `create` or `load`.

    Attributes:
        settings: The settings that the run promises, fixed before round 1.
        run: Name of the run.
        settings_type: The class of `settings`.
        positive: Names of settings that are above zero.
        derived: Names in privacy.json that follow from settings and releases.

    Guarantee:
        A release is on disk, file and folder synced, before `spend` returns; a crash
        afterwards loses the round, never its cost. With `target_epsilon` no more
        releases are admitted than it was calibrated for. After `follow` no copy of the
        run folder releases a round that another copy has released.
    """

    settings_type: ClassVar[type[Any]]
    positive: ClassVar[tuple[str, ...]]
    derived: ClassVar[tuple[str, ...]]

    def __init__(
        self,
        path: Path,
        settings: SettingsT,
        releases: list[int],
        noise_probe: Mapping[str, float] | None,
        run: str = "",
        chain: Chain | None = None,
    ) -> None:
        self.settings = settings
        self.run = run
        self._path = path
        self._releases = releases
        self._noise_probe = noise_probe
        self._chain = chain
        self._released: ReleasedRounds | None = None

    @classmethod
    def create(cls, path: Path, settings: SettingsT, run: str = "") -> Self:
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
        ledger = cls(path, settings, [], None, run, Chain(run, settings))
        ledger._write()
        return ledger

    @classmethod
    def load(cls, path: Path) -> Self:
        """Load the ledger of a run that is resumed.

        Raises:
            PrivacyError: It is missing or damaged, or its numbers contradict each other:
                nothing may be released without it.
        """
        try:
            content = json.loads(path.read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise PrivacyError(f"{path}: the ledger cannot be read: {error}") from None
        return cls.of_content(path, content)

    @classmethod
    def of_content(cls, path: Path, content: Any) -> Self:
        """Make a ledger of a file's content.

        Raises:
            PrivacyError: As `load`.
        """
        try:
            # A run of an older version lacks the settings that have a default.
            values = {
                f.name: content[f.name]
                for f in fields(cls.settings_type)
                if f.name in content or f.default is MISSING
            }
            settings = cls.settings_type(**values)
            releases = [int(r) for r in content["releases"]]
            run = str(content.get("run", ""))
            chain = read_chain(run, settings, content)
            ledger = cls(path, settings, releases, content["noise_probe"], run, chain)
            edited = ledger._contradiction(content)
        except (ValueError, KeyError, TypeError, ArithmeticError) as error:
            raise PrivacyError(f"{path}: the ledger cannot be read: {error}") from None
        if edited is not None:
            raise PrivacyError(f"{path}: the ledger was edited: {edited}")
        return ledger

    def check_same(self, settings: SettingsT) -> None:
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
            for server_round in missing:
                self._enter(server_round)
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
        self._enter(server_round)
        try:
            self._write()
        except BaseException:
            self._releases.pop()
            if self._chain is not None:
                self._chain.pop()
            raise
        if self._released is not None:
            self._released.add(server_round, known)

    def may_spend(self, max_epsilon: float) -> bool:
        """Return whether one more release keeps max_epsilon (0.0: not set) and the target."""
        settings = self.settings
        more = len(self._releases) + 1
        if settings.target_epsilon > 0 and more > settings.planned_rounds:
            return False
        return max_epsilon == 0 or self.spent_after(more) <= max_epsilon

    @abstractmethod
    def spent_after(self, num_releases: int) -> float:
        """Return the epsilon of a number of releases, under the unit's own relation."""

    @property
    def spent(self) -> float:
        """The epsilon spent so far, under the unit's own relation."""
        return self.spent_after(len(self._releases))

    @property
    def releases(self) -> list[int]:
        """The rounds released so far."""
        return list(self._releases)

    @property
    @abstractmethod
    def noise_to_signal(self) -> float:
        """R: the norm of the noise in a step over the largest norm of the step."""

    @property
    def chain(self) -> Chain | None:
        """The chain of rounds; None: an older version began the ledger."""
        return self._chain

    @property
    def head(self) -> Head | None:
        """The end of the chain of rounds; None: an older version began the ledger."""
        return None if self._chain is None else self._chain.head

    @property
    def _links(self) -> list[dict[str, Any]] | None:
        """The chain, as privacy.json has it."""
        return None if self._chain is None else self._chain.links

    def _enter(self, server_round: int) -> None:
        if self._chain is not None:
            self._chain.append(server_round)

    def note_probe(self, probe: Mapping[str, float]) -> None:
        """Record what noise alone did to the loss on public rows."""
        self._noise_probe = dict(probe)
        self._write()

    @abstractmethod
    def as_dict(self) -> dict[str, Any]:
        """Return the content of privacy.json; an unbounded epsilon is None."""

    def _contradiction(self, content: Mapping[str, Any]) -> str | None:
        """Return the first number of a file that contradicts its settings and rounds."""
        releases, settings = self._releases, self.settings
        if releases != content["releases"] or releases != sorted(set(releases)):
            return f"releases are {content['releases']!r}"
        if releases and releases[0] < 1:
            return f"releases are {releases!r}"
        for name in self.positive:
            if not 0 < getattr(settings, name) < math.inf:
                return f"{name} is {getattr(settings, name)!r}"
        if not 0 < settings.delta < 1:
            return f"delta is {settings.delta!r}"
        derived = self.as_dict()
        for name in self.derived:
            stated, true = content.get(name), derived[name]
            if stated is None or true is None:
                same = stated is true
            else:
                # Another version of SciPy may round the last digits differently.
                same = math.isclose(stated, true, rel_tol=1e-6, abs_tol=1e-9)
            if not same:
                return f"{name} is {stated!r}, but settings and rounds give {true!r}"
        return chain_fault(self._chain, releases)

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


def bounded(value: float | None) -> float | None:
    """Return None for an infinite epsilon, which JSON cannot hold."""
    return value if value is not None and math.isfinite(value) else None


def _alike(old: Any, new: Any) -> bool:
    """Return whether two settings are equal but for SciPy's last digits."""
    if isinstance(old, float) and isinstance(new, float):
        return math.isclose(old, new, rel_tol=1e-9)
    return bool(old == new)
