"""Trackers: TensorBoard, MLflow and Weights & Biases, writing into the run folder.

A tracker gets the lines of metrics.jsonl and the name of the run folder, nothing else: a value
that is null there reaches no tracker. Each package is imported only if it is chosen.
"""

import os
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, Protocol

from fedllm.errors import ConfigError

TrackerName = Literal["none", "tensorboard", "mlflow", "wandb"]

_PROJECT = "fedllm"
"""Name of project and experiment, unless WANDB_PROJECT or MLFLOW_EXPERIMENT_NAME has one."""

_PACKAGES = {"tensorboard": "tensorboard", "mlflow": "mlflow-skinny", "wandb": "wandb"}


class Tracker(Protocol):
    """A tracker: it takes numbers, round by round."""

    def log(self, server_round: int, values: Mapping[str, float]) -> None:
        """Record the numbers of a round."""

    def close(self) -> None:
        """Write all that is still in memory."""


def require_tracker(name: TrackerName) -> None:
    """Raise if a tracker's package is not installed.

    Raises:
        ConfigError: With the command that installs it.
    """
    if name != "none" and find_spec(name) is None:
        raise ConfigError(
            f"output.tracker: the package of {name!r} is not installed: "
            f"pip install {_PACKAGES[name]}, or set output.tracker='none'"
        )


def make_tracker(name: TrackerName, folder: Path) -> Tracker | None:
    """Make a tracker that writes under a run folder; None for `none`.

    Raises:
        ConfigError: Its package is not installed.
    """
    require_tracker(name)
    makers: dict[str, Callable[[Path], Tracker]] = {
        "tensorboard": _TensorBoard,
        "mlflow": _MLflow,
        "wandb": _Wandb,
    }
    return None if name == "none" else makers[name](folder)


_NAMES = {
    "train_loss": "train/loss",
    "learning_rate": "train/learning_rate",
    "validation_loss": "eval/loss",
    "client_loss": "clients/loss",
    "client_loss_best": "clients/loss_best",
    "client_loss_worst": "clients/loss_worst",
    "clients_asked": "clients/asked",
    "clients_answered": "clients/answered",
    "clients_rejected": "clients/rejected",
    "clients_evaluated": "clients/evaluated",
    "megabytes_down": "megabytes/down",
    "megabytes_up": "megabytes/up",
}
"""Names by which trackers group their charts, as Hugging Face's trainers write them."""


def numbers(line: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """Return the numbers of a line of metrics.jsonl; nulls are left out."""
    out: dict[str, float] = {}
    for key, value in line.items():
        if isinstance(value, Mapping):
            out.update(numbers(value, f"{prefix}{key}/"))
        elif isinstance(value, int | float) and key != "server_round":
            out[prefix + _NAMES.get(key, key)] = float(value)
    return out


class _TensorBoard:
    """Event files in `tensorboard/`."""

    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(folder / "tensorboard"))

    def log(self, server_round: int, values: Mapping[str, float]) -> None:
        for key, value in values.items():
            self._writer.add_scalar(key, value, server_round)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class _MLflow:
    """MLflow's folder of files in `mlflow/`."""

    def __init__(self, folder: Path) -> None:
        # MLflow sends its makers a report of each use unless this is set.
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        # Its database store needs the whole of MLflow; the folder store is enough for us.
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        from mlflow.tracking import MlflowClient

        self._client: Any = MlflowClient((folder / "mlflow").as_uri())
        # A resumed run reuses its folder, so the experiment may be there.
        # `MlflowClient` alone does not look at MLflow's own variable.
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or _PROJECT
        known = self._client.get_experiment_by_name(name)
        experiment_id = (
            known.experiment_id if known else self._client.create_experiment(name)
        )
        run = self._client.create_run(experiment_id, run_name=folder.name)
        self._run_id = run.info.run_id

    def log(self, server_round: int, values: Mapping[str, float]) -> None:
        for key, value in values.items():
            self._client.log_metric(self._run_id, key, value, step=server_round)

    def close(self) -> None:
        self._client.set_terminated(self._run_id)


class _Wandb:
    """Weights & Biases in `wandb/`; nothing is sent unless WANDB_MODE is `online`."""

    def __init__(self, folder: Path) -> None:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        settings = wandb.Settings(
            console="off",
            disable_git=True,
            disable_code=True,
            save_code=False,
            silent=True,
            x_disable_stats=True,
            x_disable_meta=True,
            x_disable_machine_info=True,
            x_save_requirements=False,
        )
        # wandb checks its own variable.
        mode: Any = os.environ.get("WANDB_MODE", "offline")
        self._run: Any = wandb.init(
            project=os.environ.get("WANDB_PROJECT") or _PROJECT,
            name=folder.name,
            dir=str(folder),
            mode=mode,
            settings=settings,
        )

    def log(self, server_round: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=server_round)

    def close(self) -> None:
        import wandb

        self._run.finish()
        # Its helper process writes the last lines when it ends.
        wandb.teardown()
