"""Audit client-level privacy: hostile replies, noise, ledger, and canary clients.

    fedllm audit
    fedllm audit --run latest
    fedllm audit --run latest --memorised

It runs a run's strategy on a toy adapter, without a base model and without data; under
privacy.trust='trustees' the clients and trustees of the run too. With no
arguments it takes the settings of ./pyproject.toml. With --run it takes those of a run and
writes audit.json into the run's folder. The exit status is 0 if every check passed.

--memorised trains instead: it plants sentences with a secret at clients of a rehearsal with
these settings and rows, which is deleted afterwards, and measures how much of them base, twin
without privacy and private model remember. With --run it writes memorised.json.
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from fedllm.auditing.auditor import MEANING, Audit, Auditor, Check
from fedllm.auditing.run_folder import (
    load_audited_run,
    require_client_unit,
)
from fedllm.auditing.sealed_auditor import SealedAuditor
from fedllm.commands.options import (
    add_clients,
    add_json,
    add_run_config,
    main_of,
    new_parser,
    positive_int,
    read_settings,
    write_json,
)
from fedllm.config import RunConfig, fedllm_home
from fedllm.config_parsing import parse_run_config
from fedllm.errors import ConfigError, PrivacyError
from fedllm.planning.noise import privacy_settings
from fedllm.privacy.ledger import PrivacySettings
from fedllm.privacy.wording import plain, rounds_text
from fedllm.reporting.report import write_report
from fedllm.runs.directory import CONFIG_FILE, RunDirectory, read_json
from fedllm.runs.record import AUDIT_FILE, MEMORISED_FILE

LATEST = "latest"
_DEFAULT_CLIENTS = 20
_DEFAULT_RECORD_CLIENTS = 10
_DEFAULT_PLANTED = 16

Print = Callable[[str], None]


def run(args: argparse.Namespace) -> int:
    """Audit what the arguments name; print a line a check and the verdict."""
    folder = None if args.run is None else _run_folder(args.run)
    show: Print = (lambda line: None) if args.json else _print
    if args.memorised:
        return _rehearse(args, folder, show)
    config = _record_level(args, folder)
    if config is not None:
        passed, content = _audit_records(args, config, folder, show)
    else:
        passed, content = _audit_clients(args, folder, show)
    if folder is not None:
        RunDirectory(folder).write_json(AUDIT_FILE, content)
        write_report(folder)
        show(f"written: {folder / AUDIT_FILE}")
    show("PASS" if passed else "FAIL")
    if args.json:
        write_json(content | {"run": None if folder is None else str(folder)})
    return 0 if passed else 1


def _rehearse(args: argparse.Namespace, folder: Path | None, show: Print) -> int:
    """Measure what such settings memorise; it decides nothing, so the status is 0."""
    from fedllm.commands.memorisation import MEANING, rehearse

    settings = dict(read_settings(args.run_config)) if folder is None else {}
    connected = None
    if folder is not None:
        kept = read_json(folder / CONFIG_FILE)
        settings, connected = kept.get("run_config") or {}, kept.get("num_clients")
    config = parse_run_config(settings)
    num_clients = (
        args.clients or connected or config.strategy.num_clients or _DEFAULT_CLIENTS
    )
    num_planted = _DEFAULT_PLANTED if args.canaries is None else args.canaries
    if min(num_planted, num_clients) < 1:
        raise PrivacyError(
            f"--canaries, --clients: must be at least 1 (got {num_planted}, {num_clients})"
        )
    often = "once" if args.repeats == 1 else f"{args.repeats} times"
    show(
        f"rehearsal of {folder or 'the settings'}: {num_planted} sentences, each planted "
        f"{often} at one of {num_clients} clients, "
        f"{rounds_text(config.num_server_rounds)} on {config.model.name}"
    )
    content = rehearse(config, num_clients, num_planted, args.repeats, show)
    if folder is not None:
        RunDirectory(folder).write_json(MEMORISED_FILE, content)
        show(f"written: {folder / MEMORISED_FILE}")
    show(MEANING)
    if args.json:
        write_json(content | {"run": None if folder is None else str(folder)})
    return 0


def _audit_clients(
    args: argparse.Namespace, folder: Path | None, show: Print
) -> tuple[bool, dict[str, Any]]:
    """Audit client-level privacy; return whether it passed and audit.json's content."""
    first: list[Check] = []
    if folder is not None:
        config, settings, check = load_audited_run(folder)
        first.append(check)
        num_clients = settings.population_size if args.clients is None else args.clients
    else:
        config = parse_run_config(read_settings(args.run_config))
        require_client_unit(config.privacy.unit, "these settings")
        connected = config.strategy.num_clients or _DEFAULT_CLIENTS
        num_clients = connected if args.clients is None else args.clients
        # d enters R only, and no epsilon.
        settings = privacy_settings(config, max(num_clients, 1), args.dimension)
    num_canaries = 1000 if args.canaries is None else args.canaries
    auditor = _auditor(config, settings, num_clients, num_canaries, args.dimension)
    show(
        f"audit of {folder or 'the settings'}: {rounds_text(settings.planned_rounds)}, "
        f"sampling {settings.sampling!r}, clipping norm {settings.clipping_norm:g}, "
        f"noise multiplier {settings.noise_multiplier:.4g}, delta {settings.delta:g}; "
        f"{num_clients} honest clients, {num_canaries} canaries, {args.dimension:,} "
        f"values{_trustees(settings)}"
    )
    for check in first:
        show(_check_line(check))
    audit = auditor.run(lambda check: show(_check_line(check)))
    audit = replace(audit, checks=first + audit.checks)
    for line in _verdict_lines(audit, settings):
        show(line)
    return audit.passed, {**audit.as_dict(), "settings": asdict(settings)}


def _auditor(
    config: RunConfig, settings: PrivacySettings, clients: int, canaries: int, size: int
) -> Auditor:
    """Return what audits a run: its strategy, or the parties of a sealed one."""
    if not config.is_sealed:
        return Auditor(config, settings, clients, canaries, size)
    from fedllm.commands.sealed_parties import SealedParties

    return SealedAuditor(config, settings, clients, canaries, size, SealedParties)


def _trustees(settings: PrivacySettings) -> str:
    if not settings.trustees:
        return ""
    return (
        f"; sealed to {settings.trustees} trustees, of whom {settings.colluding} may be the "
        "server's"
    )


def _record_level(args: argparse.Namespace, folder: Path | None) -> RunConfig | None:
    """Return the run config if its privacy unit is the record, else None."""
    settings: dict[str, Any] = {}
    if folder is None:
        settings = dict(read_settings(args.run_config))
    elif (folder / CONFIG_FILE).is_file():
        settings = read_json(folder / CONFIG_FILE).get("run_config") or {}
    if settings.get("privacy.unit") != "record":
        return None
    return parse_run_config(settings)


def _audit_records(
    args: argparse.Namespace, config: RunConfig, folder: Path | None, show: Print
) -> tuple[bool, dict[str, Any]]:
    """Ask a client about its rows, and guess which canaries are planted among them.

    The result is as for clients.
    """
    from fedllm.auditing.canary_records import audit_first_client
    from fedllm.auditing.person_checks import check_persons
    from fedllm.auditing.row_questions import ask_about_rows
    from fedllm.client.message_handler import reply_to

    if config.is_sealed:
        raise PrivacyError(
            "privacy.trust: 'trustees' is not audited at record level, only at client level; "
            "what holds it are the tests that SECURITY.md names"
        )
    if config.train.objective != "sft":
        raise ConfigError(
            "train.objective: must be 'sft' in an audit of record level (got "
            f"{config.train.objective!r}), whose canaries are questions with an answer; "
            "clipping, coins and noise are the same under both"
        )
    num_canaries = 200 if args.canaries is None else args.canaries
    if num_canaries < 1:
        raise PrivacyError(f"--canaries: must be at least 1 (got {num_canaries})")
    connected = config.strategy.num_clients or _DEFAULT_RECORD_CLIENTS
    num_clients = args.clients or connected
    show(
        f"audit of {folder or 'the settings'}: record level, {num_canaries} canary "
        f"examples, each planted in the first of {num_clients} clients by a fair coin; "
        f"{rounds_text(config.num_server_rounds)} of training on {config.model.name}"
    )
    answers = list(ask_about_rows(reply_to))
    for answer in answers:
        show(
            f"{'PASS' if answer.passed else 'FAIL'}  rows, {answer.question}: {answer.text}"
        )
    if config.data.person_column:
        persons = check_persons()
        show(f"{'PASS' if persons.passed else 'FAIL'}  persons: {persons.text}")
    findings = audit_first_client(config, num_clients, num_canaries)
    certified = findings.certified
    show(
        f"{'PASS' if findings.passed else 'FAIL'}  membership: the loss of planted "
        f"canaries fell by {findings.fall_planted:.3f}, of others by "
        f"{findings.fall_others:.3f}; {certified.num_correct} of "
        f"{certified.num_guesses} guesses right"
    )
    show(
        f"accounted epsilon:     {plain(findings.accounted)} (add or remove one record)"
    )
    show(
        f"certified lower bound: {certified.epsilon:.2f} (confidence 95 %; "
        f"{num_canaries} canaries can certify at most {findings.most:.2f})"
    )
    show(MEANING)
    passed = findings.passed and all(answer.passed for answer in answers)
    if config.data.person_column:
        passed = passed and persons.passed
    content = {**findings.as_dict(), "passed": passed}
    return passed, content | {"rows": [asdict(answer) for answer in answers]}


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


def _verdict_lines(audit: Audit, settings: PrivacySettings) -> list[str]:
    """Return what the canaries of the whole run show."""
    findings = audit.rehearsal
    if findings is None:
        return ["the run could not be rehearsed, so nothing is known of its epsilon"]
    estimate = "none under Poisson sampling"
    if findings.estimate is not None:
        bounds = findings.estimate
        estimate = f"{bounds.epsilon:.2f} ({bounds.low:.2f} to {bounds.high:.2f})"
    return [
        f"accounted epsilon:     {plain(findings.accounted)} (zero-out, delta "
        f"{settings.delta:g}, {findings.rounds} of {settings.planned_rounds} rounds)",
        f"certified lower bound: {findings.certified.epsilon:.2f} (confidence 95 %)",
        f"estimate:              {estimate}",
        MEANING,
    ]


def _check_line(check: Check) -> str:
    return f"{'PASS' if check.passed else 'FAIL'}  {check.name}: {check.text}"


def _print(line: str) -> None:
    """Print a line at once: an audit takes minutes."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def parser() -> argparse.ArgumentParser:
    """Return the command's parser."""
    parser = new_parser("audit", __doc__)
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--run",
        nargs="?",
        const=LATEST,
        metavar="FOLDER",
        help="audit the settings of a run, by default the latest, and its ledger",
    )
    add_run_config(source)
    add_clients(
        parser, "honest clients of the rehearsal; default: those of the run, else 20"
    )
    parser.add_argument(
        "--canaries",
        type=int,
        metavar="M",
        help="canary clients, default 1000; at record level canary examples, 200; with "
        "--memorised sentences, 16",
    )
    parser.add_argument(
        "--memorised",
        action="store_true",
        help="plant sentences in a rehearsal and measure what is remembered; takes two "
        "trainings",
    )
    parser.add_argument(
        "--repeats",
        type=positive_int,
        default=1,
        metavar="N",
        help="with --memorised: how often a sentence stands among its client's rows "
        "(default: 1)",
    )
    parser.add_argument(
        "--dimension",
        type=int,
        default=100_000,
        metavar="D",
        help="values of the toy adapter; at least 10 times the canaries",
    )
    add_json(parser)
    return parser


main = main_of(parser, run)

if __name__ == "__main__":
    main()
