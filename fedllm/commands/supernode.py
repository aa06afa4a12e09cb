"""Start Flower's SuperNode, whose clients need not import their libraries every time.

    fedllm supernode --superlink HOST:9192 --node-config 'data-path="..."' ...

This is `flower-supernode`: it gets every argument but --home, and its own help follows
this one. Beside it waits a process that has imported torch, transformers, PEFT and TRL,
and forks a client for each message. The SuperNode looks for work 20 times a second, not
once (FLWR_SUPEREXEC_TASK_POLL_INTERVAL sets it). Linux only: elsewhere, and if that process
cannot be started, each client imports the libraries itself.
"""

import argparse
import os
import sys

from fedllm.commands.options import add_home, new_parser, print_help, run_command

_POLL_SECONDS = 0.05
_ASKS_FLOWER = {"-h", "--help", "-V", "--version"}


def run(args: argparse.Namespace) -> int:
    """Start the fork server if clients can be forked, and become `flower-supernode`."""
    from fedllm.deployment.flower_programs import (
        become,
        flower_environment,
        make_home,
    )

    arguments = args.others
    os.environ.update(flower_environment(_POLL_SECONDS))
    if _ASKS_FLOWER & {*arguments}:
        print_help(parser(), arguments)
    else:
        if args.home:
            make_home(args.home)
        _prepare_forks(arguments)
    become("flower-supernode", arguments)


def _prepare_forks(arguments: list[str]) -> None:
    """Put the program that asks for forks first on PATH, if it is of use."""
    from fedllm.deployment import supernode
    from fedllm.deployment.flower_programs import environment_bin

    if not supernode.can_fork(arguments):
        return
    try:
        folder, *_ = supernode.start_fork_server(
            environment_bin() / supernode.CLIENTAPP, supernode.FORK_SERVER_COMMAND
        )
    except OSError as error:
        print(f"each client imports its libraries: {error}", file=sys.stderr)
    else:
        os.environ["PATH"] = f"{folder}{os.pathsep}{os.environ['PATH']}"


def parser() -> argparse.ArgumentParser:
    """Return the command's parser."""
    parser = new_parser("supernode", __doc__, hands_on=True)
    add_home(parser, "models, logs and ledgers")
    return parser


def main(arguments: list[str] | None = None) -> None:
    """Run the command; an error is one line and exit status 1."""
    run_command(parser(), run, arguments, hands_on=True)


if __name__ == "__main__":
    main()
