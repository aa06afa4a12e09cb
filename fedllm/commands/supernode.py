"""Start Flower's SuperNode, whose clients need not import their libraries every time.

    fedllm supernode --superlink HOST:9192 --node-config 'data-path="..."' ...

This is `flower-supernode`: it gets every argument but those below, and its own help follows
them. The node runs the installed fedllm and no app that differs from it, and over TLS only
runs that its owner has approved (`fedllm node`). Beside it waits a process that has imported
torch, transformers, PEFT and TRL, and forks a client for each message. The SuperNode looks
for work 20 times a second, not once (FLWR_SUPEREXEC_TASK_POLL_INTERVAL sets it). Linux only:
elsewhere, and if that process cannot be started, each client imports the libraries itself.
"""

import argparse
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from fedllm.commands.options import (
    add_home,
    main_of,
    new_parser,
    parse_pairs,
    print_help,
)

_POLL_SECONDS = 0.05
_ASKS_FLOWER = {"-h", "--help", "-V", "--version"}
_INSTALLS = "--allow-runtime-dependency-installation"
_ISOLATION = "--isolation"
_NODE_CONFIG = "--node-config"
_KEY = "--auth-supernode-private-key"
_INSECURE = "--insecure"
_ANSWERED = {
    "all": "all within the limits of the node config are answered",
    "same-settings": "answered once one with the same app and settings is approved: "
    "fedllm node list",
    "each": "none is answered before it is approved: fedllm node list",
}


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
        # Logs quote rows, and what is delivered is kept: only its owner may read them.
        os.umask(0o077)
        make_home(args.home)
        _require_node_config(arguments)
        _require_guard(arguments, args.any_app)
        _require_private_files(arguments)
        _prepare_guard(args, arguments)
        _prepare_forks(arguments)
        _prepare_personal(args.personal)
    become("flower-supernode", arguments)


def _values(arguments: list[str], option: str) -> Iterator[str]:
    """Yield the values of an option of Flower, which may be cut short; "" for a flag."""
    for number, word in enumerate(arguments):
        name, has_value, value = word.partition("=")
        if len(name) > 3 and option.startswith(name):
            following = arguments[number + 1 : number + 2]
            yield value if has_value else "".join(following)


def _require_node_config(arguments: list[str]) -> None:
    """Check that every word of the node config is understood before the node starts.

    Raises:
        ConfigError: A limit would be lost.
    """
    from fedllm.client.node_config import parse_node_config

    for text in _values(arguments, _NODE_CONFIG):
        parse_node_config(parse_pairs(text, _NODE_CONFIG))


def _require_guard(arguments: list[str], is_any_app: bool) -> None:
    """Check that every client will be one that this command guards.

    Raises:
        ConfigError: Flower or somebody else would start what no owner chose.
    """
    from fedllm.errors import ConfigError

    if is_any_app:
        return
    if any(True for _ in _values(arguments, _INSTALLS)):
        raise ConfigError(
            f"{_INSTALLS}: would run packages that this node's owner has not chosen: "
            "leave it out, or add --any-app"
        )
    if "process" in _values(arguments, _ISOLATION):
        raise ConfigError(
            f"{_ISOLATION} process: nothing compares the apps of clients that are "
            "started elsewhere: leave it out, or add --any-app"
        )


def _require_private_files(arguments: list[str]) -> None:
    """Check that nobody else can write the node's key.

    Raises:
        ConfigError: Another user can.
    """
    from fedllm.strict_modes import require_strict_modes

    for key in _values(arguments, _KEY):
        require_strict_modes(Path(key).expanduser())


def _prepare_guard(args: argparse.Namespace, arguments: list[str]) -> None:
    """Put the guarded programs first on PATH, and export what their owner chose.

    Raises:
        ConfigError: They cannot be run, or the log's head cannot be written elsewhere.
        NodeError: The pin is no SHA-256.
    """
    from fedllm.deployment.fork_client import FORK_SERVER
    from fedllm.deployment.supernode import (
        APPROVE,
        PROGRAMS,
        PYTHON,
        SUPERLINK,
    )
    from fedllm.errors import ConfigError
    from fedllm.node.delivered_app import ANY, CHOICE, INSTALLED, parse_pin
    from fedllm.node.log import LOG_HEAD

    if os.pathsep in str(PROGRAMS):
        raise ConfigError(
            f"{PROGRAMS}: goes first on PATH, which a {os.pathsep!r} would split: install "
            "fedllm in another folder"
        )
    programs = list(PROGRAMS.iterdir())
    if not programs or not all(os.access(program, os.X_OK) for program in programs):
        raise ConfigError(
            f"{PROGRAMS}: its programs cannot be run: chmod +x {PROGRAMS}/*"
        )
    choice = ANY if args.any_app else INSTALLED
    os.environ[CHOICE] = parse_pin(args.pin_app) if args.pin_app else choice
    os.environ[SUPERLINK] = next(_values(arguments, "--superlink"), "")
    os.environ[APPROVE] = _policy(args.approve, arguments)
    os.environ[PYTHON] = sys.executable
    # One that an earlier node left would send clients to any process that listens there now.
    os.environ.pop(FORK_SERVER, None)
    if args.log_head:
        os.environ[LOG_HEAD] = str(Path(args.log_head).expanduser().absolute())
    os.environ["PATH"] = f"{PROGRAMS}{os.pathsep}{os.environ['PATH']}"


def _policy(chosen: str | None, arguments: list[str]) -> str:
    """Return which runs are answered, and print it in one line."""
    from fedllm.node.approvals import ALL, EACH

    is_insecure = any(True for _ in _values(arguments, _INSECURE))
    policy = chosen or (ALL if is_insecure else EACH)
    how = f"the default {f'with {_INSECURE}' if is_insecure else 'over TLS'}"
    print(
        f"runs: {_ANSWERED[policy]} (--approve {policy}{'' if chosen else f', {how}'})",
        file=sys.stderr,
    )
    return policy


def _prepare_forks(arguments: list[str]) -> None:
    """Start the fork server and export its socket, if it is of use."""
    from fedllm.deployment import supernode
    from fedllm.deployment.fork_client import FORK_SERVER

    if not supernode.can_fork(arguments):
        return
    try:
        path, *_ = supernode.start_fork_server(supernode.FORK_SERVER_COMMAND)
    except OSError as error:
        print(f"each client imports its libraries: {error}", file=sys.stderr)
    else:
        os.environ[FORK_SERVER] = str(path)


def _prepare_personal(when: str) -> None:
    """Start the process that trains what runs deliver, if the owner wants it."""
    if when != "after-run":
        return
    from fedllm.deployment.personal_watch import PERSONAL_WATCH_COMMAND
    from fedllm.deployment.supernode import start_helper

    try:
        start_helper(PERSONAL_WATCH_COMMAND)
    except OSError as error:
        print(f"no personal adapter is trained here: {error}", file=sys.stderr)


def parser() -> argparse.ArgumentParser:
    """Return the command's parser."""
    parser = new_parser("supernode", __doc__, hands_on=True)
    add_home(parser, "models, logs and ledgers")
    app = parser.add_mutually_exclusive_group()
    app.add_argument(
        "--pin-app",
        metavar="SHA256",
        help="run this one app, of `fedllm keys --app-hash`, in place of the installed",
    )
    app.add_argument(
        "--any-app",
        action="store_true",
        help="run whatever the server sends; for developers",
    )
    parser.add_argument(
        "--approve",
        choices=tuple(_ANSWERED),
        help="which runs are answered: all; after `fedllm node approve` all with the same "
        "settings; or each only then (default: each; with --insecure all)",
    )
    parser.add_argument(
        "--personal",
        choices=("by-hand", "after-run"),
        default="by-hand",
        help="when this node trains on from an adapter that a run delivered: by `fedllm node "
        "personal`, or by itself after the run (default: by-hand)",
    )
    parser.add_argument(
        "--log-head",
        metavar="FILE",
        help="where else the end of the node's log is noted, best on another disk",
    )
    return parser


main = main_of(parser, run, hands_on=True)

if __name__ == "__main__":
    main()
