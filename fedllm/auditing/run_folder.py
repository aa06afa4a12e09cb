"""Load a run folder to audit."""

from dataclasses import replace
from pathlib import Path

from fedllm.auditing.auditor import Check
from fedllm.config import RunConfig
from fedllm.config_parsing import parse_run_config
from fedllm.errors import PrivacyError
from fedllm.planning.noise import privacy_settings
from fedllm.privacy.ledger import Ledger, PrivacySettings
from fedllm.privacy.wording import plain, rounds_text
from fedllm.runs.directory import (
    CONFIG_FILE,
    METRICS_FILE,
    PRIVACY_FILE,
    read_json,
    read_metrics,
)


def load_audited_run(folder: Path) -> tuple[RunConfig, PrivacySettings, Check]:
    """Return a run's config, its privacy settings, and the check of its ledger.

    Raises:
        FedllmError: The folder, its ledger or its config is missing, damaged or edited.
    """
    path = folder / PRIVACY_FILE
    if not path.is_file():
        raise PrivacyError(f"{folder}: has no {PRIVACY_FILE}: not a run folder")
    require_client_unit(read_json(path).get("unit"), str(folder))
    ledger = Ledger.load(path)
    run_config = read_json(folder / CONFIG_FILE).get("run_config")
    if not isinstance(run_config, dict):
        raise PrivacyError(f"{folder / CONFIG_FILE}: is damaged: it has no run_config")
    config = parse_run_config(run_config)
    _require_same_promise(ledger, config, path)
    rounds = [
        line["server_round"]
        for line in read_metrics(folder / METRICS_FILE)
        if line["server_round"] > 0
    ]
    missing = sorted(set(rounds) - set(ledger.releases))
    check = Check(
        "ledger of the run",
        not missing,
        f"{rounds_text(len(ledger.releases))} in the ledger, {len(rounds)} in {METRICS_FILE}"
        + (f": it forgets {missing}" if missing else "")
        + f"; epsilon {plain(ledger.epsilons().zero_out)} zero-out",
    )
    # The audit attacks the rounds of this run alone.
    return config, replace(ledger.settings, earlier_mu_squared=0.0), check


def _require_same_promise(ledger: Ledger, config: RunConfig, path: Path) -> None:
    """Raise if the ledger's settings are not those of the run's config.

    Raises:
        PrivacyError: The settings that differ.
    """
    settings = ledger.settings
    given = replace(
        config.privacy,
        noise_multiplier=settings.noise_multiplier,
        target_epsilon=0.0,
    )
    size, d = settings.population_size, settings.num_trainable
    promised = privacy_settings(
        replace(config, privacy=given),
        *(size, d, settings.earlier_mu_squared, settings.start_note),
        # Of those that the config names some may have been absent.
        trustees=settings.trustees if _may_open(config, settings.trustees) else None,
    )
    noise = config.privacy.noise_multiplier or settings.noise_multiplier
    promised = replace(
        promised,
        target_epsilon=config.privacy.target_epsilon,
        noise_multiplier=noise,
    )
    try:
        ledger.check_same(promised)
    except PrivacyError as error:
        raise PrivacyError(
            f"{path}: is not the ledger of {CONFIG_FILE} beside it: {error}"
        ) from None
    planned = ledger.epsilon_after(settings.planned_rounds).zero_out
    if settings.target_epsilon > 0 and planned > settings.target_epsilon * (1 + 1e-6):
        raise PrivacyError(
            f"{path}: the ledger was edited: its noise multiplier "
            f"{settings.noise_multiplier:g} spends {plain(planned)} in "
            f"{settings.planned_rounds} rounds, above target_epsilon "
            f"{settings.target_epsilon:g}"
        )


def _may_open(config: RunConfig, trustees: int) -> bool:
    """Return whether so many trustees may open a config's rounds."""
    most = len(config.trustees)
    return config.least_trustees <= trustees <= most if most else trustees == 0


def require_client_unit(unit: object, what: str) -> None:
    """Raise if a run or a config has no client-level privacy to audit.

    Args:
        unit: Its `privacy.unit`.
        what: The run or config, for the error.

    Raises:
        PrivacyError: The unit is `none`, or unknown.
    """
    if unit == "none":
        raise PrivacyError(
            f"nothing to audit: {what} promise no privacy (privacy.unit='none')"
        )
    if unit != "client":
        raise PrivacyError(
            f"privacy.unit: must be 'client' or 'record' (got {unit!r} in {what})"
        )
