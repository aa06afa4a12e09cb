"""Open a stopped run and adopt its settings."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fedllm.config import RunConfig, Scalar, flat
from fedllm.config_parsing import parse_run_config
from fedllm.errors import ConfigError, FederationError
from fedllm.runs.checkpoint import RESUME_KEY, Checkpoint, require_unchanged
from fedllm.runs.directory import CONFIG_FILE, RESULT_FILE, RunDirectory, read_json


@dataclass(frozen=True)
class Resumed:
    """A run folder that is opened again and locked."""

    directory: RunDirectory
    config: RunConfig
    checkpoint: Checkpoint


def open_run(config: RunConfig, home: Path) -> Resumed:
    """Open the run that `resume.from` names, with the settings that it began with.

    Args:
        config: The run config as typed.
        home: fedllm's folder.

    Raises:
        ConfigError: A typed setting differs from what the run began with.
        FederationError: It is no run folder, or the run is finished, in use, damaged or not
            begun.
    """
    named = config.resume.from_
    folder = (home / "runs" / "latest" if named == "latest" else Path(named)).resolve()
    if not (folder / CONFIG_FILE).is_file():
        raise FederationError(
            f"resume.from: {folder} is not a run folder: it has no {CONFIG_FILE}; the "
            f"runs are in {home / 'runs'}"
        )
    directory = RunDirectory(folder)
    directory.lock()
    try:
        if (folder / RESULT_FILE).exists():
            raise FederationError(
                f"resume.from: the run of {folder} is finished: {RESULT_FILE} is there; "
                "start a new one without resume.from"
            )
        content = read_json(folder / CONFIG_FILE)
        adopted = settings_of_run(
            config, content.get("run_config", {}), folder / CONFIG_FILE
        )
        return Resumed(directory, adopted, Checkpoint.read(folder))
    except BaseException:
        directory.unlock()
        raise


def settings_of_run(
    typed: RunConfig, kept: Mapping[str, Scalar], source: Path
) -> RunConfig:
    """Return the settings that a run began with.

    Args:
        typed: The current run config. A value equal to pyproject's counts as not typed.
        kept: The flat settings of the run.
        source: The file of those, for errors.

    Raises:
        ConfigError: A typed value differs from what the run began with.
    """
    try:
        config = parse_run_config({**kept, RESUME_KEY: typed.resume.from_})
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from None
    then, now, defaults = flat(config), flat(typed), flat(RunConfig())
    require_unchanged(
        {key: then[key] for key in now if now[key] != defaults[key]},
        now,
        f"{source}: a resumed run keeps its settings, so leave these out",
    )
    return config
