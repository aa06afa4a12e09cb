"""The record of a run: its folder, read once for the page, the card and the list."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedllm.config import cohorts_are_secret
from fedllm.errors import FedllmError
from fedllm.runs.directory import (
    CONFIG_FILE,
    METRICS_FILE,
    PRIVACY_FILE,
    RESULT_FILE,
    read_json,
    read_metrics,
)
from fedllm.runs.state import STATE_FILE, State, read_state

ANSWERS_FILE = "answers.json"
AUDIT_FILE = "audit.json"
MEMORISED_FILE = "memorised.json"


@dataclass(frozen=True)
class RunRecord:
    """The content of a run folder; empty or None for what a run has not written yet.

    Attributes:
        folder: The run folder.
        state: Running, finished, failed or interrupted.
        reason: The reason of a failure; None if there is none or it is not known.
        config: config.json.
        privacy: privacy.json.
        rounds: The lines of metrics.jsonl; round 0 is the untuned model.
        result: result.json; None before the end.
        answers: answers.json: sample answers to public questions; None if there are none.
        audit: audit.json; None if the run was not audited.
        memorised: memorised.json; None if no rehearsal tested what such a run memorises.
    """

    folder: Path
    state: State
    reason: str | None
    config: dict[str, Any]
    privacy: dict[str, Any]
    rounds: list[dict[str, Any]]
    result: dict[str, Any] | None
    answers: dict[str, Any] | None
    audit: dict[str, Any] | None
    memorised: dict[str, Any] | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """The flat run config."""
        settings = self.config.get("run_config") or {}
        if not isinstance(settings, dict):
            raise FedllmError(f"{self.folder / CONFIG_FILE}: is damaged: no run_config")
        return settings

    @property
    def rounds_done(self) -> int:
        """Number of finished rounds."""
        return max((line["server_round"] for line in self.rounds), default=0)

    @property
    def rounds_planned(self) -> int | None:
        """Number of planned rounds; None if it is not known."""
        return self.settings.get("num-server-rounds")

    @property
    def secret_cohorts(self) -> bool:
        """Whether the clients of a round, and their number, are secret."""
        return cohorts_are_secret(
            self.privacy.get("unit"), self.privacy.get("sampling")
        )


def read_run(folder: Path) -> RunRecord:
    """Read a run folder.

    Raises:
        FedllmError: It is no run folder, or a file in it is damaged.
    """
    if not folder.is_dir():
        raise FedllmError(f"{folder}: there is no such run folder")
    begun = (folder / STATE_FILE).is_file()
    if not begun and not (folder / CONFIG_FILE).is_file():
        raise FedllmError(f"{folder}: is damaged: it has no {CONFIG_FILE}")
    result = _optional(folder / RESULT_FILE)
    state, reason = read_state(folder, result is not None)
    metrics = folder / METRICS_FILE
    return RunRecord(
        folder=folder,
        state=state,
        reason=reason,
        config=_optional(folder / CONFIG_FILE) or {},
        privacy=_optional(folder / PRIVACY_FILE) or {},
        rounds=read_metrics(metrics) if metrics.exists() else [],
        result=result,
        answers=_optional(folder / ANSWERS_FILE),
        audit=_optional(folder / AUDIT_FILE),
        memorised=_optional(folder / MEMORISED_FILE),
    )


def _optional(path: Path) -> dict[str, Any] | None:
    """Read a file; None if it does not exist."""
    return read_json(path) if path.exists() else None
