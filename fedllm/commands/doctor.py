"""Check whether this machine can run a config; print a remedy for each problem.

    fedllm doctor
    fedllm doctor --run-config configs/openllama-3b-private.toml
    fedllm doctor --node ROWS.jsonl --country DE

The third looks at a node's own rows instead: columns, empty answers, copies, what the length
limit cuts, likely personal identifiers, and whether they are enough for the promised epsilon.
Nothing of them leaves the machine. Nothing is fetched or trained. The exit status is 1 if a run
would fail.
"""

import argparse
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from fedllm.commands.options import (
    add_json,
    add_run_config,
    main_of,
    new_parser,
    read_run_config,
    write_json,
)
from fedllm.deployment.preflight import Check, checks
from fedllm.errors import FedllmError


def run(args: argparse.Namespace) -> int:
    """Print each check as it ends, then the verdict."""
    # A user cannot act on what transformers logs while it is imported.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    made: list[Check] = []
    for check in _all_checks(args):
        made.append(check)
        if not args.json:
            sys.stdout.write(str(check))
            sys.stdout.flush()
    failed = [check for check in made if check.level == "FAIL"]
    if args.json:
        write_json({"ready": not failed, "checks": [asdict(check) for check in made]})
    elif failed:
        sys.stdout.write(f"{len(failed)} of {len(made)} checks failed\n")
    else:
        what = "a run can use these rows" if args.node else "this machine can run it"
        sys.stdout.write(f"{what}\n")
    return 1 if failed else 0


def _all_checks(args: argparse.Namespace) -> Iterator[Check]:
    """Yield the check of the settings; if they are valid, the machine's or the rows'."""
    try:
        config = read_run_config(args.run_config)
    except FedllmError as error:
        for line in str(error).splitlines():
            yield Check("config", "FAIL", line)
        return
    yield Check("config", "ok", "every key is understood")
    if args.node is None:
        yield from checks(config)
        return
    from fedllm.deployment.row_checks import row_checks

    yield from row_checks(Path(args.node), config, args.country)


def parser() -> argparse.ArgumentParser:
    """Return the command's parser."""
    parser = new_parser("doctor", __doc__)
    add_run_config(parser)
    parser.add_argument(
        "--node", metavar="FILE", help="look at a node's rows, as data-path names them"
    )
    parser.add_argument(
        "--country",
        type=str.upper,
        metavar="XX",
        help="with --node: look for this country's telephone and personal numbers too",
    )
    add_json(parser)
    return parser


main = main_of(parser, run)

if __name__ == "__main__":
    main()
