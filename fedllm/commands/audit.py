"""Audit client-level privacy: hostile replies, noise, ledger, and canary clients.

Runs the strategy of a run on a toy adapter, without a base model and without data. With
no arguments it takes the settings of ./pyproject.toml; with --run those that a run had,
and writes audit.json into its folder. The exit status is 0 where every check passed.
"""

import argparse
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from fedllm.auditing.auditor import MEANING, Audit, Auditor, Check
from fedllm.config import RunConfig, fedllm_home, parse_run_config
from fedllm.errors import FedllmError, PrivacyError
from fedllm.noise_plan import privacy_settings
from fedllm.privacy.accounting import plain
from fedllm.privacy.ledger import Ledger, PrivacySettings
from fedllm.report import write_report
from fedllm.reporting.record import AUDIT_FILE
from fedllm.run_directory import (
    CONFIG_FILE,
    METRICS_FILE,
    PRIVACY_FILE,
    RunDirectory,
    read_json,
    read_metrics,
)
from fedllm.typed_config import typed_config

LATEST = "latest"


def main(arguments: list[str] | None = None) -> None:
    """Run the command; an error is one line and exit status 1."""
    args = _parser().parse_args(arguments)
    try:
        passed = _run(args)
    except FedllmError as error:
        sys.exit(f"{type(error).__name__}: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
    sys.exit(0 if passed else 1)


def _run(args: argparse.Namespace) -> bool:
    """Audit what the arguments name, and say so."""
    folder: Path | None = None
    first: list[Check] = []
    if args.run is not None:
        folder = _run_folder(args.run)
    if (config := _record_level(args, folder)) is not None:
        return _run_records(args, config, folder)
    if folder is not None:
        config, settings, check = _of_run(folder)
        first.append(check)
        num_clients = settings.population_size if args.clients is None else args.clients
    else:
        config = parse_run_config(typed_config(args.run_config or ()))
        _require_unit(config.privacy.unit, "these settings")
        connected = config.strategy.num_clients or 20
        num_clients = connected if args.clients is None else args.clients
        # d enters R only, and no epsilon.
        settings = privacy_settings(config, max(num_clients, 1), args.dimension)
    num_canaries = 1000 if args.canaries is None else args.canaries
    auditor = Auditor(config, settings, num_clients, num_canaries, args.dimension)
    _say(
        f"audit of {folder or 'the settings'}: {settings.planned_rounds} rounds, "
        f"sampling {settings.sampling!r}, clipping norm {settings.clipping_norm:g}, "
        f"noise multiplier {settings.noise_multiplier:.4g}, delta {settings.delta:g}; "
        f"{num_clients} honest clients, {num_canaries} canaries, {args.dimension:,} "
        "values"
    )
    for check in first:
        _say_check(check)
    found = auditor.run(_say_check)
    audit = replace(found, checks=first + found.checks)
    _say_verdict(audit, settings)
    if folder is not None:
        content = {**audit.as_dict(), "settings": asdict(settings)}
        RunDirectory(folder).write_json(AUDIT_FILE, content)
        write_report(folder)
        _say(f"written: {folder / AUDIT_FILE}")
    _say("PASS" if audit.passed else "FAIL")
    return audit.passed


def _record_level(args: argparse.Namespace, folder: Path | None) -> RunConfig | None:
    """Return the run config if it is one of record level."""
    typed: dict[str, Any] = {}
    if folder is None:
        typed = dict(typed_config(args.run_config or ()))
    elif (folder / CONFIG_FILE).is_file():
        typed = read_json(folder / CONFIG_FILE).get("run_config") or {}
    if typed.get("privacy.unit") != "record":
        return None
    return parse_run_config(typed)


def _run_records(
    args: argparse.Namespace, config: RunConfig, folder: Path | None
) -> bool:
    """Plant canaries in the records of one client, and say what a guesser sees."""
    from fedllm.auditing.records import audit_first_client

    num_canaries = 200 if args.canaries is None else args.canaries
    if num_canaries < 1:
        raise PrivacyError(f"--canaries: must be at least 1 (got {num_canaries})")
    num_clients = args.clients or config.strategy.num_clients or 10
    _say(
        f"audit of {folder or 'the settings'}: record level, {num_canaries} canary "
        f"examples, each planted in the first of {num_clients} clients by a fair coin; "
        f"{config.num_server_rounds} rounds of training on {config.model.name}"
    )
    found = audit_first_client(config, num_clients, num_canaries)
    _say(
        f"{'PASS' if found.passed else 'FAIL'}  membership: the loss of planted canaries "
        f"fell by {found.fall_planted:.3f}, of others by {found.fall_others:.3f}; "
        f"{found.certified.num_correct} of {found.certified.num_guesses} guesses right"
    )
    _say(f"accounted epsilon:     {plain(found.accounted)} (add or remove one record)")
    _say(
        f"certified lower bound: {found.certified.epsilon:.2f} (confidence 95 %; "
        f"{num_canaries} canaries can certify at most {found.most:.2f})"
    )
    _say(MEANING)
    if folder is not None:
        RunDirectory(folder).write_json(AUDIT_FILE, found.as_dict())
        write_report(folder)
        _say(f"written: {folder / AUDIT_FILE}")
    _say("PASS" if found.passed else "FAIL")
    return found.passed


def _of_run(folder: Path) -> tuple[RunConfig, PrivacySettings, Check]:
    """Read what a run promised, and hold its files against each other.

    Raises:
        FedllmError: The folder, its ledger or its config is missing, damaged or edited.
    """
    path = folder / PRIVACY_FILE
    if not path.is_file():
        raise PrivacyError(f"{folder}: has no {PRIVACY_FILE}: not a run folder")
    _require_unit(read_json(path).get("unit"), str(folder))
    ledger = Ledger.load(path)
    run_config = read_json(folder / CONFIG_FILE).get("run_config")
    if not isinstance(run_config, dict):
        raise PrivacyError(f"{folder / CONFIG_FILE}: is damaged: it has no run_config")
    config = parse_run_config(run_config)
    _require_same(ledger, config, path)
    told = [
        line["server_round"]
        for line in read_metrics(folder / METRICS_FILE)
        if line["server_round"] > 0
    ]
    forgotten = sorted(set(told) - set(ledger.releases))
    check = Check(
        "ledger of the run",
        not forgotten,
        f"{len(ledger.releases)} rounds in the ledger, {len(told)} in {METRICS_FILE}"
        + (f": it forgets {forgotten}" if forgotten else "")
        + f"; epsilon {plain(ledger.epsilons().zero_out)} zero-out",
    )
    return config, ledger.settings, check


def _require_same(ledger: Ledger, config: RunConfig, path: Path) -> None:
    """Refuse a ledger whose promise is not that of the run's config.

    Raises:
        PrivacyError: Names what differs.
    """
    settings = ledger.settings
    given = replace(
        config.privacy,
        noise_multiplier=settings.noise_multiplier,
        target_epsilon=0.0,
    )
    size, d = settings.population_size, settings.num_trainable
    promised = privacy_settings(replace(config, privacy=given), size, d)
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


def _require_unit(unit: object, what: str) -> None:
    if unit == "none":
        raise PrivacyError(
            f"nothing to audit: {what} promise no privacy (privacy.unit='none')"
        )
    if unit != "client":
        raise PrivacyError(
            f"privacy.unit: must be 'client' or 'record' (got {unit!r} in {what})"
        )


def _run_folder(name: str) -> Path:
    """Return a run folder; `latest` is the last one made.

    Raises:
        PrivacyError: It does not exist.
    """
    runs = fedllm_home() / "runs"
    folder = runs / LATEST if name == LATEST else Path(name).expanduser()
    if not folder.is_dir():
        raise PrivacyError(f"{folder}: there is no such run folder")
    return folder.resolve()


def _say_verdict(audit: Audit, settings: PrivacySettings) -> None:
    found = audit.rehearsal
    if found is None:
        _say("the run could not be rehearsed, so nothing is known of its epsilon")
        return
    _say(
        f"accounted epsilon:     {plain(found.accounted)} (zero-out, delta "
        f"{settings.delta:g}, {found.rounds} of {settings.planned_rounds} rounds)"
    )
    _say(f"certified lower bound: {found.certified.epsilon:.2f} (confidence 95 %)")
    if found.estimate is None:
        _say("estimate:              none under Poisson sampling")
    else:
        estimate = found.estimate
        _say(
            f"estimate:              {estimate.epsilon:.2f} ({estimate.low:.2f} to "
            f"{estimate.high:.2f})"
        )
    _say(MEANING)


def _say_check(check: Check) -> None:
    _say(f"{'PASS' if check.passed else 'FAIL'}  {check.name}: {check.text}")


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--run",
        nargs="?",
        const=LATEST,
        metavar="FOLDER",
        help="audit the settings of a run, by default the latest, and its ledger",
    )
    source.add_argument(
        "--run-config",
        action="append",
        metavar="CONFIG",
        help="as of flwr run: a TOML file, or key=value pairs",
    )
    parser.add_argument(
        "--clients",
        type=int,
        metavar="N",
        help="honest clients of the rehearsal; default: those of the run, else 20",
    )
    parser.add_argument(
        "--canaries",
        type=int,
        metavar="M",
        help="canary clients, default 1000; of record level canary examples, 200",
    )
    parser.add_argument(
        "--dimension",
        type=int,
        default=100_000,
        metavar="D",
        help="values of the toy adapter; at least 10 times the canaries",
    )
    return parser


if __name__ == "__main__":
    main()
