"""Check whether this machine can run a config; print a remedy for each problem.

    fedllm doctor
    fedllm doctor --run-config configs/openllama-3b-private.toml

Nothing is fetched or trained. The exit status is 1 if a run would fail.
"""

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict

from fedllm.commands.options import (
    add_json,
    add_run_config,
    new_parser,
    read_run_config,
    run_command,
    write_json,
)
from fedllm.deployment.preflight import Check, checks
from fedllm.errors import FedllmError


def run(args: argparse.Namespace) -> int:
    """Print each check as it ends, then the verdict."""
    # A user cannot act on what transformers logs while it is imported.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    made: list[Check] = []
    for check in _all_checks(args.run_config):
        made.append(check)
        if not args.json:
            _print_check(check)
    failed = [check for check in made if check.level == "FAIL"]
    if args.json:
        write_json({"ready": not failed, "checks": [asdict(check) for check in made]})
    elif failed:
        sys.stdout.write(f"{len(failed)} of {len(made)} checks failed\n")
    else:
        sys.stdout.write("this machine can run it\n")
    return 1 if failed else 0


def _all_checks(run_config: Sequence[str]) -> Iterator[Check]:
    """Yield the check of the settings; if they are valid, the machine's after it."""
    try:
        config = read_run_config(run_config)
    except FedllmError as error:
        for line in str(error).splitlines():
            yield Check("config", "FAIL", line)
        return
    yield Check("config", "ok", "every key is understood")
    yield from checks(config)


def _print_check(check: Check) -> None:
    """Print one line, with the remedy below it."""
    text = f"{check.level:<5} {check.name}: {check.text}\n"
    if check.remedy:
        text += f"      -> {check.remedy}\n"
    sys.stdout.write(text)
    sys.stdout.flush()


def parser() -> argparse.ArgumentParser:
    """Return the command's parser."""
    parser = new_parser("doctor", __doc__)
    add_run_config(parser)
    add_json(parser)
    return parser


def main(arguments: list[str] | None = None) -> None:
    """Run the command; an error is one line and exit status 1."""
    run_command(parser(), run, arguments)


if __name__ == "__main__":
    main()
