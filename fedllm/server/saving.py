"""What a run keeps on disk after a round: adapters, the best round, the checkpoint."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fedllm.adapters.spec import AdapterSpec, Arrays
from fedllm.config import RunConfig
from fedllm.runs.checkpoint import Checkpoint, State, spec_as_json
from fedllm.runs.directory import RunDirectory
from fedllm.server.account import PrivacyAccount


@dataclass
class BestRound:
    """The round with the lowest validation loss; round 0 is what the run starts from."""

    server_round: int
    loss: float
    arrays: Arrays


@dataclass
class Progress:
    """How far a run has come.

    Attributes:
        arrays: The global adapter's trained values by name, float32.
        next_round: The first round that this process runs.
        last_round: The last finished round; 0: none.
        trained: Whether a client ever returned a usable update.
        best: The best round so far; None: no round was scored.
        failures: Why replies had no usable update -> how often.
    """

    arrays: Arrays
    next_round: int = 1
    last_round: int = 0
    trained: bool = False
    best: BestRound | None = None
    failures: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class RunIdentity:
    """What names a run and its models, and does not change when it is resumed.

    Attributes:
        run_id: Flower's id of the run when it began.
        base_name: Folder or hub id of the base model.
        fingerprint: Fingerprint of the base model.
    """

    run_id: int
    base_name: str
    fingerprint: str


class RunSaver:
    """Writes the run folder's adapters and checkpoints.

    Args:
        directory: The run folder.
        config: The run config.
        identity: The run and its base model.
        spec: The adapter.
    """

    def __init__(
        self,
        directory: RunDirectory,
        config: RunConfig,
        identity: RunIdentity,
        spec: AdapterSpec,
    ) -> None:
        self._directory = directory
        self._config = config
        self._identity = identity
        self._spec = spec

    def save_round(
        self, progress: Progress, server_round: int, loss: float | None, clients: int
    ) -> None:
        """Write `peft_<round>/`, drop the one before if it is not due, keep the best.

        Args:
            progress: The run, whose `last_round` is still the round before.
            server_round: The round that just ended.
            loss: Its validation loss; None: not scored.
            clients: Population size, for the adapter's own description.
        """
        previous, best = progress.last_round, progress.best
        if (
            previous
            and previous % self._config.output.save_every
            and not (best is not None and best.server_round == previous)
        ):
            self._directory.drop_round(previous)
        self._save_adapter(server_round, progress.arrays, clients)
        self.keep_best(progress, server_round, loss)

    def keep_best(
        self, progress: Progress, server_round: int, loss: float | None
    ) -> None:
        """Make a round the best one if its loss is the lowest so far."""
        best = progress.best
        if loss is not None and best is not None and loss < best.loss:
            progress.best = BestRound(server_round, loss, progress.arrays)
            self._directory.copy_adapter(server_round, "peft_best")

    def save_start(self, progress: Progress, clients: int) -> None:
        """Write the adapter that the run starts from, the best until a round beats it."""
        self._save_adapter(0, progress.arrays, clients)
        self._directory.copy_adapter(0, "peft_best")

    def write_checkpoint(
        self,
        progress: Progress,
        account: PrivacyAccount,
        population: list[int],
        moments: Mapping[str, Any],
    ) -> None:
        """Write what the next round starts from, once this one is paid for and saved."""
        best = progress.best
        secret = self._config.cohorts_are_secret
        state = State(
            run=account.run,
            run_id=self._identity.run_id,
            server_round=progress.last_round,
            releases=account.releases,
            population=population,
            trained=progress.trained,
            # The number of failures is a bound on the number of clients asked.
            failures={} if secret else dict(progress.failures),
            best_round=best.server_round if best else None,
            best_loss=best.loss if best else None,
            base=self._identity.fingerprint,
            adapter=spec_as_json(self._spec),
        )
        arrays = best.arrays if best else {}
        checkpoint = Checkpoint(state, progress.arrays, arrays, dict(moments))
        checkpoint.write(self._directory)

    def restore_folder(self, progress: Progress, clients: int) -> None:
        """Make the run folder what it was after the last finished round."""
        self._directory.roll_back(progress.last_round)
        if progress.last_round:
            self._save_adapter(progress.last_round, progress.arrays, clients)
        best = progress.best
        if best is not None and (best.server_round or self._config.starts_tuned):
            self._save_adapter(best.server_round, best.arrays, clients)
            self._directory.copy_adapter(best.server_round, "peft_best")
        self._directory.link_as_latest()

    def _save_adapter(self, server_round: int, arrays: Arrays, clients: int) -> None:
        """Write `peft_<round>/` with what the adapter records about itself."""
        origin = {
            "model": self._config.model.name,
            "quantization": self._config.model.quantization,
            "num_clients": clients,
            "run": str(self._directory.path),
        }
        self._directory.save_round(
            server_round, self._spec, arrays, self._identity.base_name, origin
        )
