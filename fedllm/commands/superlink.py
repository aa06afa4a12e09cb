"""Start Flower's SuperLink as the server of a deployment.

    fedllm superlink --keys ~/federation/keys --home ~/federation/server

This is `flower-superlink` with TLS, nodes' keys, a database and the packages of this
environment. It listens on loopback: let the gate of deploy/Caddyfile open a port to the
network, and nothing else. Any argument that is not listed here is handed on to
`flower-superlink`, whose own help follows this one.
"""

import argparse
import logging
import os
from pathlib import Path

from fedllm.commands.options import add_home, main_of, new_parser, print_help

logger = logging.getLogger(__name__)

_POLL_SECONDS = 0.25
_ASKS_FLOWER = {"-h", "--help", "-V", "--version"}


def run(args: argparse.Namespace) -> int:
    """Become `flower-superlink`."""
    from fedllm.deployment.flower_programs import become, flower_environment

    arguments = args.others
    if args.wipe:
        return _wipe(args)
    if _ASKS_FLOWER & {*arguments}:
        print_help(parser(), arguments)
    else:
        arguments = _arguments(args)
    os.environ.update(flower_environment(_POLL_SECONDS))
    become("flower-superlink", arguments)


def _wipe(args: argparse.Namespace) -> int:
    """Remove collected updates from the database's files, and return 0.

    Raises:
        FederationError: There is none, or a SuperLink has it open.
    """
    from fedllm.deployment.flower_programs import make_home
    from fedllm.deployment.superlink import wipe_database

    os.umask(0o077)
    database = args.database or make_home(args.home) / "superlink.db"
    wipe_database(Path(database).expanduser())
    return 0


def _arguments(args: argparse.Namespace) -> list[str]:
    """Return the arguments of `flower-superlink`, and prepare its home.

    Raises:
        ConfigError: Keys are missing, or the home cannot be made.
    """
    from fedllm.deployment.certificates import expiry_warning
    from fedllm.deployment.flower_programs import make_home
    from fedllm.deployment.superlink import superlink_arguments

    # The database holds clients' updates: only its owner may read it.
    os.umask(0o077)
    home = make_home(args.home)
    keys = Path(args.keys).expanduser() if args.keys else None
    if keys is not None and (keys / "server.crt").is_file():
        warning = expiry_warning(keys / "server.crt")
        if warning:
            logger.warning("%s", warning)
    return superlink_arguments(
        keys,
        args.port,
        args.database or str(home / "superlink.db"),
        args.others,
    )


def parser() -> argparse.ArgumentParser:
    """Return the command's parser."""
    parser = new_parser("superlink", __doc__, hands_on=True)
    parser.add_argument(
        "--keys",
        metavar="DIR",
        help="folder that `fedllm keys` made, for TLS and nodes",
    )
    add_home(parser, "run folders and the database")
    parser.add_argument(
        "--port",
        type=int,
        default=9191,
        metavar="N",
        help="where it listens, on loopback (default: %(default)s)",
    )
    parser.add_argument(
        "--database", metavar="FILE", help="its state (default: superlink.db at home)"
    )
    parser.add_argument(
        "--wipe",
        action="store_true",
        help="start nothing: after a run, remove collected updates from the database",
    )
    return parser


main = main_of(parser, run, hands_on=True)

if __name__ == "__main__":
    main()
