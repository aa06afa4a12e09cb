"""Start or resume a run: returns a ready federation."""

import logging
import platform
import re
from importlib.metadata import version
from typing import Any

from flwr.serverapp import Grid

from fedllm.adapters.peft_model import initial_arrays
from fedllm.adapters.resolve import adapter_spec
from fedllm.adapters.spec import AdapterSpec
from fedllm.config import RunConfig, fedllm_home, flat
from fedllm.data.overlap import (
    judged_by_embedded,
    require_no_public_row_trains,
    require_public_rows_apart,
)
from fedllm.evaluation.public_rows import PublicRows
from fedllm.planning.adapter_choice import choose_adapter, with_choice
from fedllm.reporting.monitor import RunMonitor
from fedllm.reporting.trackers import require_tracker
from fedllm.runs.directory import (
    CONFIG_FILE,
    PRIVACY_FILE,
    RunDirectory,
    read_json,
)
from fedllm.runs.resume import Resumed, open_run
from fedllm.server.account import AccountTerms, PrivacyAccount
from fedllm.server.declared_rows import ask_declared_rows
from fedllm.server.federation import Federation, first_instructions
from fedllm.server.ledger_head import HeadSigner
from fedllm.server.local_grid import is_simulation
from fedllm.server.population import LEAST_CLIENTS, wait_for_clients
from fedllm.server.privacy_account import open_account
from fedllm.server.saving import BestRound, Progress, RunIdentity, RunSaver
from fedllm.server.start_adapter import NOTHING, start_of_run
from fedllm.server.trustees import SealedNodes
from fedllm.strategy.build import make_strategy

logger = logging.getLogger(__name__)

_COMMIT = re.compile("[0-9a-f]{40}")

_PACKAGES = ("flwr", "torch", "transformers", "peft", "trl", "bitsandbytes")


def set_up(
    config: RunConfig,
    grid: Grid,
    run_id: int,
    least_clients: int = LEAST_CLIENTS,
    directory: RunDirectory | None = None,
) -> Federation:
    """Start a new run, or open the one that `resume.from` names.

    Args:
        config: The run config.
        grid: Flower's way to the clients.
        run_id: Flower's id of the run.
        least_clients: Fewest clients that a run may have.
        directory: The folder of a new run; None: one under `runs/`.

    Returns:
        The federation, whose folder is locked until its `run` ends.

    Raises:
        ConfigError: A setting does not fit the model, the run that is resumed, or the
            installed packages; or a row that is declared public also trains.
        FederationError: Too few clients connected in time, or the run to be resumed
            cannot be.
        ModelError: The base model cannot be had.
        PrivacyError: The account of the run that is resumed cannot be trusted.
    """
    require_tracker(config.output.tracker)
    home = fedllm_home()
    resumed = open_run(config, home) if config.resume.from_ else None
    if resumed is not None:
        config, directory = resumed.config, resumed.directory
        run_id = resumed.checkpoint.state.run_id
    else:
        directory = directory or RunDirectory.create(home, run_id)
        directory.lock()
    try:
        logger.info("run folder: %s", directory.path)
        monitor = RunMonitor(
            directory.path, config.output.tracker, config.cohorts_are_secret
        )
        with monitor.showing_failure():
            monitor.serve(config.output.metrics_port, config.num_server_rounds)
            return _assemble(
                config, grid, run_id, least_clients, directory, monitor, resumed
            )
    except BaseException:
        directory.unlock()
        raise


def _assemble(
    config: RunConfig,
    grid: Grid,
    run_id: int,
    least_clients: int,
    directory: RunDirectory,
    monitor: RunMonitor,
    resumed: Resumed | None,
) -> Federation:
    """Find the model and the clients, and build what the rounds need."""
    from fedllm.data.model_limits import require_positions
    from fedllm.models.location import base_digest, fingerprint, load_config, locate

    home = fedllm_home()
    base_name = locate(config.model.name, home)
    model_config = load_config(base_name)
    require_positions(config.train.max_length, model_config)
    digest = base_digest(base_name, home)
    _log_unpinned(config, digest)
    _log_judges(config, grid)
    if config.adapter.kind != "auto":
        # An adapter that does not fit fails before anybody is waited for.
        adapter_spec(config.adapter, model_config, config.seed)
    require_no_public_row_trains(config)
    require_public_rows_apart(config)
    known = resumed.checkpoint.state.population if resumed else []
    population = wait_for_clients(grid, config, known, least_clients)
    declared: dict[int, int] = {}
    sealed = roster = None
    if config.is_sealed:
        told = first_instructions(config, run_id, digest, resumed is not None)
        sealed = SealedNodes(grid, config, run_id, told, _trustees_of(resumed))
        meeting = sealed.meet(known, least_clients)
        population, declared = meeting.population, meeting.declared
        roster = meeting.roster
    elif config.is_joint and resumed is None:
        declared = ask_declared_rows(grid, config, population, least_clients)
        population = list(declared)
    config = _with_adapter_kind(config, len(population))
    spec = adapter_spec(config.adapter, model_config, config.seed)
    identity = RunIdentity(run_id, base_name, fingerprint(base_name))
    if resumed is not None:
        resumed.checkpoint.state.check_model(identity.fingerprint, spec)
    start, earlier = initial_arrays(spec), NOTHING
    if config.adapter.start_from and resumed is None:
        start, earlier = start_of_run(config, spec, base_name, len(population), home)
    public = PublicRows(config, home)
    if config.data.public_train and resumed is None:
        from fedllm.server.public_training import train_on_public_rows

        start = train_on_public_rows(public.adapted(), config, start)
    # A caller that names the folder of a new run, as a comparison does, never resumes it.
    is_kept = resumed is not None or directory.path.parent == home / "runs"
    terms = AccountTerms(
        config,
        directory,
        len(population),
        spec.num_trainable,
        resumed is not None,
        home if is_kept else None,
        list(declared.values()),
        earlier,
        0 if roster is None else len(roster.present),
    )
    account = open_account(terms)
    progress = _progress_of(resumed, account, config) if resumed else None
    if progress is None:
        progress = Progress(start)
    strategy = make_strategy(
        config, progress.arrays, population, account.ledger, roster
    )
    saver = RunSaver(directory, config, identity, spec)
    if resumed is not None:
        strategy.averaging.optimizer.restore(resumed.checkpoint.moments)
        saver.restore_folder(progress, len(population))
    else:
        directory.write_json(
            CONFIG_FILE, _resolved(config, len(population), base_name, digest, spec)
        )
    return Federation(
        config=config,
        grid=grid,
        run_id=run_id,
        resumed=resumed is not None,
        population=population,
        spec=spec,
        base_digest=digest,
        directory=directory,
        public=public,
        account=account,
        strategy=strategy,
        saver=saver,
        monitor=monitor,
        progress=progress,
        heads=HeadSigner(home),
        sealed=sealed,
    )


def _trustees_of(resumed: Resumed | None) -> int:
    """Return the most trustees that the ledger of a resumed run counts on; 0: it is new."""
    if resumed is None:
        return 0
    path = resumed.directory.path / PRIVACY_FILE
    # The account reads it again, and distrusts it.
    return int(read_json(path).get("trustees") or 0)


def _log_judges(config: RunConfig, grid: Grid) -> None:
    """Log if the package's own public rows judge a run whose clients may have other rows."""
    if judged_by_embedded(config.data) and not is_simulation(grid):
        logger.info(
            "public rows of %s, which come with fedllm, judge this run: if its clients have "
            "rows of their own (data-path), set data.name='own'",
            config.data.name,
        )


def _log_unpinned(config: RunConfig, digest: str) -> None:
    """Warn if another machine, or another day, may take another model or other rows."""
    from fedllm.data.rows import is_hub_id
    from fedllm.models.location import repository

    name, commit = repository(config.model.name)
    if digest.startswith(f"{name} ") and commit is None:
        logger.warning(
            "model.name: %s is not pinned, and is commit %s today: "
            "model.name='%s@%s' is the same model on every node and day",
            *(name, digest.split()[-1], name, digest.split()[-1]),
        )
    name, _, revision = config.data.name.partition("@")
    if is_hub_id(config.data.name) and not _COMMIT.fullmatch(revision):
        logger.warning(
            "data.name: %s is not pinned: each node takes the newest commit that it "
            "finds; write %s@ and the commit",
            *(config.data.name, name),
        )


def _with_adapter_kind(config: RunConfig, num_clients: int) -> RunConfig:
    """Resolve `adapter.kind="auto"` for this many clients, and log the choice."""
    if config.adapter.kind != "auto":
        return config
    choice = choose_adapter(config, num_clients)
    logger.info("adapter.kind auto: %s; %s", choice.kind, choice.reason)
    config = with_choice(config, choice)
    if choice.measured is not None:
        logger.info(
            "adapter.kind auto: clipping norm %g and server learning rate %g to %g, as "
            "measured with this kind",
            config.privacy.clipping_norm,
            config.strategy.server_learning_rate,
            config.strategy.server_learning_rate_min,
        )
    return config


def _progress_of(
    resumed: Resumed, account: PrivacyAccount, config: RunConfig
) -> Progress:
    """Return the progress of a checkpoint, and log the round at which it resumes.

    Raises:
        PrivacyError: The account lacks a round that the checkpoint has paid for.
        FederationError: No round is left, and none was finished.
    """
    checkpoint, state = resumed.checkpoint, resumed.checkpoint.state
    next_round = state.round_after(account.run, account.releases)
    state.log_resumed(next_round, config.num_server_rounds)
    progress = Progress(
        checkpoint.arrays, next_round, state.server_round, state.trained
    )
    progress.failures.update(state.failures)
    if state.best_round is not None and state.best_loss is not None:
        progress.best = BestRound(state.best_round, state.best_loss, checkpoint.best)
    return progress


def _resolved(
    config: RunConfig,
    num_clients: int,
    base_name: str,
    digest: str,
    spec: AdapterSpec,
) -> dict[str, Any]:
    """Return the content of config.json: every setting, and what it resolved to."""
    return {
        "run_config": flat(config),
        "num_clients": num_clients,
        "base": base_name,
        "base_digest": digest,
        "num_trainable": spec.num_trainable,
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in _PACKAGES},
        },
    }
