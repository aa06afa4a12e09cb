"""The adapter that a run starts from, and what its clients have spent on it already."""

import logging
from dataclasses import dataclass
from pathlib import Path

from fedllm.adapters.spec import AdapterSpec, Arrays
from fedllm.adapters.start import start_arrays
from fedllm.config import RunConfig
from fedllm.errors import FedllmError
from fedllm.privacy.ledger import Ledger
from fedllm.privacy.released_rounds import ReleasedRounds
from fedllm.privacy.wording import plain
from fedllm.runs.directory import PRIVACY_FILE, read_json

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Earlier:
    """What the runs before have spent, from whose adapter a run starts.

    Attributes:
        mu_squared: Sum of 1 / z^2 over their rounds, if this run's epsilon can count them.
        note: What it does not count; empty: nothing.
    """

    mu_squared: float = 0.0
    note: str = ""


NOTHING = Earlier()


def start_of_run(
    config: RunConfig, spec: AdapterSpec, base: str, population_size: int, home: Path
) -> tuple[Arrays, Earlier]:
    """Return the values of `adapter.start-from`, and what its ledger says.

    The rounds of a run at client level count in those of a run at client level with as many
    clients, if no client is drawn by a coin: all are Gaussian, and their mu^2 add up, those
    of a chain of runs too. Nothing else is added: then both statements stand.

    Args:
        config: The run config.
        spec: The adapter of the run.
        base: The base model, as `locate` returned it.
        population_size: Clients N.
        home: fedllm's folder.

    Raises:
        AdapterError: The folder holds no adapter of this kind, rank and base.
    """
    folder = Path(config.adapter.start_from).expanduser().absolute()
    arrays = start_arrays(folder, spec, base, home)
    if config.adapter.start_is_public:
        logger.info("start: %s, public by its owner's word", folder)
        return arrays, NOTHING
    earlier = _earlier(folder.parent / PRIVACY_FILE, config, population_size, home)
    if config.privacy.unit == "none":
        earlier = NOTHING
    logger.info("start: %s", folder)
    if earlier.note:
        logger.warning("not covered: %s", earlier.note)
    return arrays, earlier


def _earlier(
    path: Path, config: RunConfig, population_size: int, home: Path
) -> Earlier:
    """Return what the ledger beside an adapter says, and what its copies released."""
    unknown = Earlier(
        note=f"what the start adapter tells of anybody's rows: {path} is no ledger that "
        "could be checked (adapter.start-is-public=true is its owner's word that there "
        "is nothing to tell)"
    )
    rounds: set[int] = set()
    try:
        content = read_json(path)
        unit, run = str(content["unit"]), str(content["run"])
        if unit != "client":
            epsilon, delta = content["epsilon"], content["delta"]
            ledger = None
        else:
            ledger = Ledger.load(path)
            rounds = {*ledger.releases, *_released_elsewhere(home, ledger.run)}
            epsilon, delta = ledger.spent, ledger.settings.delta
    except (FedllmError, OSError, ValueError, KeyError, TypeError):
        return unknown
    if unit == "none" or epsilon is None:
        return unknown
    if ledger is not None and ledger.settings.start_note:
        # What a chain of runs does not know, its last run does not know either.
        return Earlier(note=ledger.settings.start_note)
    same = (
        ledger is not None
        and config.privacy.unit == "client"
        and ledger.settings.population_size == population_size
        and "poisson" not in (ledger.settings.sampling, config.strategy.sampling)
    )
    if ledger is None or not same:
        return Earlier(
            note=f"run {run}, whose adapter this one starts from: its own statement, "
            f"epsilon {plain(float(epsilon))} at delta {float(delta):g} for each {unit}, "
            "stands beside this one"
        )
    settings = ledger.settings
    spent = len(rounds) / settings.noise_multiplier**2
    return Earlier(mu_squared=settings.earlier_mu_squared + spent)


def _released_elsewhere(home: Path, run: str) -> list[int]:
    """Return the rounds that any copy of a run's folder has released from this machine.

    Raises:
        PrivacyError: They cannot be read.
    """
    released = ReleasedRounds(home, run)
    return released.read() if released.path.exists() else []
