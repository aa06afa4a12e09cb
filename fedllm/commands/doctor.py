"""Say whether this machine can run a config, with a remedy for each thing that is wrong.

    python -m fedllm.commands.doctor
    python -m fedllm.commands.doctor --run-config configs/openllama-3b-private.toml

Nothing is fetched or trained. The exit status is 1 where a run would fail.
"""

import argparse
import json
import os
import sys
from dataclasses import asdict

from fedllm.commands.options import typed_config
from fedllm.config import parse_run_config
from fedllm.deployment.preflight import Check, checks
from fedllm.errors import FedllmError


def main(arguments: list[str] | None = None) -> None:
    """Run the command."""
    args = _parser().parse_args(arguments)
    # What transformers says while it is imported is not for this screen.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    found: list[Check] = []
    try:
        config = parse_run_config(typed_config(args.run_config or []))
        found.append(Check("config", "ok", "every key is understood"))
    except FedllmError as error:
        sys.exit("\n".join(f"FAIL  config: {line}" for line in str(error).splitlines()))
    for check in found:
        _say(args, check)
    for check in checks(config):
        found.append(check)
        _say(args, check)
    failed = [check for check in found if check.level == "FAIL"]
    if args.json:
        content = {"ready": not failed, "checks": [asdict(check) for check in found]}
        sys.stdout.write(json.dumps(content, indent=2) + "\n")
    elif failed:
        sys.stdout.write(f"{len(failed)} of {len(found)} checks failed\n")
    else:
        sys.stdout.write("this machine can run it\n")
    sys.exit(1 if failed else 0)


def _say(args: argparse.Namespace, check: Check) -> None:
    """Write one line, and its remedy below it."""
    if args.json:
        return
    text = f"{check.level:<5} {check.name}: {check.text}\n"
    if check.remedy:
        text += f"      -> {check.remedy}\n"
    sys.stdout.write(text)
    sys.stdout.flush()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--run-config",
        action="append",
        metavar="CONFIG",
        help="as of flwr run: a TOML file, or key=value pairs",
    )
    parser.add_argument("--json", action="store_true", help="one object, for programs")
    return parser


if __name__ == "__main__":
    main()
