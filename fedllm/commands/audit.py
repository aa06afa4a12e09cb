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
from fedllm.auditing.run_folder import load_audited_run, require_client_unit
from fedllm.commands.options import typed_config
from fedllm.config import RunConfig, fedllm_home, parse_run_config
from fedllm.errors import FedllmError, PrivacyError
from fedllm.planning.noise import privacy_settings
from fedllm.privacy.ledger import PrivacySettings
from fedllm.privacy.wording import plain
from fedllm.reporting.report import write_report
from fedllm.runs.directory import CONFIG_FILE, RunDirectory, read_json
from fedllm.runs.record import AUDIT_FILE

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
        config, settings, check = load_audited_run(folder)
        first.append(check)
        num_clients = settings.population_size if args.clients is None else args.clients
    else:
        config = parse_run_config(typed_config(args.run_config or ()))
        require_client_unit(config.privacy.unit, "these settings")
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
    from fedllm.auditing.canary_records import audit_first_client

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
