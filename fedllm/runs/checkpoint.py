"""The checkpoint of a run: what it needs to resume after a crash.

A checkpoint holds what was released or follows from it: the adapter, the server optimiser's
moments, the best adapter. It holds no draw and no generator: under differential privacy noise
and secret cohorts are fresh after a crash, and without it they follow from seed and round.
"""

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fedllm.adapters.spec import AdapterSpec
from fedllm.errors import ConfigError, FederationError, PrivacyError
from fedllm.foreign_text import printable
from fedllm.runs.directory import RunDirectory

logger = logging.getLogger(__name__)

CHECKPOINT_FILE = "checkpoint.safetensors"
RESUME_KEY = "resume.from"
_STATE = "fedllm"

# The most differences in one error; another model may differ in hundreds of layers.
_SHOWN = 5
Named = dict[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class State:
    """The part of a checkpoint that is not arrays.

    Attributes:
        run: Name of the run, as in its ledger.
        run_id: Flower's id of the run when it began.
        server_round: The last finished round.
        releases: The rounds paid for by then; empty without privacy.
        population: Node ids of all clients.
        trained: Whether a client ever returned a usable update.
        failures: Reason of a reply without a usable update -> count.
        best_round: The round with the lowest validation loss; None if none was scored.
        best_loss: Its loss.
        base: `models.fingerprint` of the base model.
        adapter: The adapter's declaration, as `spec_as_json` writes it.
    """

    run: str
    run_id: int
    server_round: int
    releases: list[int]
    population: list[int]
    trained: bool
    failures: dict[str, int]
    best_round: int | None
    best_loss: float | None
    base: str
    adapter: dict[str, Any]

    def check_model(self, base: str, spec: AdapterSpec) -> None:
        """Raise if the base model or the adapter has changed.

        Args:
            base: `models.fingerprint` of the current base model.
            spec: The current adapter.

        Raises:
            ConfigError: With each entry that differs.
        """
        require_unchanged(
            {"base model": self.base},
            {"base model": base},
            "resume.from: the run began with another base model",
        )
        require_unchanged(
            self.adapter,
            spec_as_json(spec),
            "resume.from: the run began with another adapter",
        )

    def round_after(self, run: str, releases: list[int]) -> int:
        """Return the first round that was neither finished nor paid for.

        Args:
            run: The run named in the ledger.
            releases: The ledger's rounds.

        Raises:
            PrivacyError: The ledger is of another run, or misses a round.
        """
        if run != self.run:
            raise PrivacyError(
                f"privacy.json is of the run {run!r}, and the checkpoint of {self.run!r}"
            )
        if releases[: len(self.releases)] != self.releases:
            raise PrivacyError(
                f"the ledger has the rounds {releases}, but {self.releases} had been "
                "paid for when the checkpoint was written: it was edited or put back"
            )
        return max([self.server_round, *releases]) + 1

    def log_resumed(self, next_round: int, num_rounds: int) -> None:
        """Log where the run resumes, and which rounds were paid for and lost.

        Raises:
            FederationError: No round is left, and none was finished.
        """
        lost = list(range(self.server_round + 1, next_round))
        if self.server_round == 0 and next_round > num_rounds:
            raise FederationError(
                "resume.from: every round was paid for and lost, so there is nothing "
                "to resume; what a new run spends adds to it"
            )
        if lost:
            logger.warning(
                "%d round(s) were paid for and lost (%s): they count as spent, and the "
                "run has as many fewer",
                len(lost),
                ", ".join(map(str, lost)),
            )
        logger.info(
            "resumed after round %d; next is round %d of %d",
            self.server_round,
            next_round,
            num_rounds,
        )


@dataclass(frozen=True)
class Checkpoint:
    """A run after a round.

    Attributes:
        state: All that is not arrays.
        arrays: The global adapter by name, float32.
        best: The adapter of the best round; empty if none was scored.
        moments: The server optimiser's, (d,) float64 by name; empty if it has none.
    """

    state: State
    arrays: Named
    best: Named
    moments: Named

    def write(self, directory: RunDirectory) -> None:
        """Replace the previous checkpoint: a crash leaves one or the other.

        Raises:
            FederationError: The disk is full or cannot be written.
        """
        from safetensors.numpy import save

        parts = {"adapter": self.arrays, "best": self.best, "moments": self.moments}
        named = {
            f"{part}/{name}": np.ascontiguousarray(value)
            for part, arrays in parts.items()
            for name, value in arrays.items()
        }
        state = json.dumps(asdict(self.state), allow_nan=False)
        directory.write_file(CHECKPOINT_FILE, save(named, metadata={_STATE: state}))

    @classmethod
    def read(cls, folder: Path) -> "Checkpoint":
        """Read the checkpoint of a run folder.

        Raises:
            FederationError: There is none, or it is damaged.
        """
        from safetensors import SafetensorError, safe_open

        path = folder / CHECKPOINT_FILE
        if not path.exists():
            raise FederationError(
                f"{folder}: this run stopped before its first round, so nothing was "
                "trained and nothing spent: start it again without resume.from"
            )
        parts: dict[str, Named] = {"adapter": {}, "best": {}, "moments": {}}
        try:
            with safe_open(str(path), framework="np") as file:
                state = _read_state(file.metadata()[_STATE])
                for key in file.keys():  # noqa: SIM118 - not a dict
                    part, _, name = key.partition("/")
                    parts[part][name] = file.get_tensor(key)
        except (
            SafetensorError,
            OSError,
            ValueError,
            KeyError,
            TypeError,
            AttributeError,
        ) as error:
            raise FederationError(
                f"{path}: the checkpoint is damaged ({error}): the run cannot be resumed"
            ) from None
        return cls(state, parts["adapter"], parts["best"], parts["moments"])


def _read_state(text: str) -> State:
    """Return the part that is not arrays; the reasons of failures were clients' words."""
    content = json.loads(text)
    failures = {printable(k): int(n) for k, n in content["failures"].items()}
    return State(**{**content, "failures": failures})


def require_unchanged(
    then: Mapping[str, Any], now: Mapping[str, Any], what: str
) -> None:
    """Raise if an entry has changed since the run began.

    Args:
        then: The entries that the run began with.
        now: The current entries.
        what: The beginning of the error.

    Raises:
        ConfigError: With each entry that differs, and both values.
    """
    changed = [
        f"{key} was {then[key]!r} and is now {now.get(key)!r}"
        for key in then
        if then[key] != now.get(key)
    ]
    if len(changed) > _SHOWN:
        changed[_SHOWN:] = [f"and {len(changed) - _SHOWN} more"]
    if changed:
        raise ConfigError(f"{what}: " + "; ".join(changed))


def spec_as_json(spec: AdapterSpec) -> dict[str, Any]:
    """Return an adapter's declaration as JSON values, one key a module."""
    flat_spec: dict[str, Any] = json.loads(json.dumps(asdict(spec)))
    modules = flat_spec.pop("modules")
    return {**flat_spec, **{f"module {name}": modules[name] for name in modules}}
