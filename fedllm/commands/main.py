# PYTHON_ARGCOMPLETE_OK
"""The script `fedllm`: it lists the commands and runs one of them.

Only the chosen command's module is imported, so that a list, a version and a completed
word wait for no library.
"""

import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any

from fedllm.commands.options import error_text, new_parser
from fedllm.errors import ConfigError

COMMANDS = {
    "simulate": "run a federation of virtual clients on this machine",
    "evaluate": "ask a tuned model, or measure it",
    "compare": "train with and without federation and privacy, side by side",
    "plan": "what a privacy budget costs, before a run",
    "audit": "attack the privacy of a run's settings",
    "runs": "list the runs of this machine, or show one",
    "dossier": "a run's facts, signed, for those who must sign",
    "doctor": "check whether this machine can run a config",
    "export": "merge an adapter into its base model",
    "demo": "a page where base and tuned model answer side by side",
    "keys": "make the certificates and keys of a deployment",
    "superlink": "the server of a deployment",
    "supernode": "one client of a deployment",
    "node": "approve runs of this node, and read its log",
}
"""A module of this package for each, with `main(arguments)`, and a line about it."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command that the first argument names.

    Raises:
        SystemExit: The command failed, or there is no such command.
    """
    if "_ARGCOMPLETE" in os.environ:
        _complete()
    words = list(sys.argv[1:] if arguments is None else arguments)
    first = words[0] if words else "--help"
    if first in ("-h", "--help"):
        sys.stdout.write(_overview())
    elif first == "--version":
        from importlib.metadata import version

        sys.stdout.write(f"fedllm {version('fedllm')}\n")
    elif first in COMMANDS:
        _module(first).main(words[1:])
    else:
        sys.exit(error_text(_unknown(first)))


def _module(name: str) -> Any:
    """Import a command's module."""
    return import_module(f"fedllm.commands.{name}")


def _overview() -> str:
    """Return the list of commands."""
    lines = [f"  {name:<10} {line}" for name, line in COMMANDS.items()]
    return "\n".join(["usage: fedllm COMMAND [--help] ...  |  --version", *lines, ""])


def _unknown(word: str) -> ConfigError:
    """Return the error for a word that is no command, with the nearest one."""
    from difflib import get_close_matches

    nearest = get_close_matches(word, COMMANDS, n=1, cutoff=0.5)
    remedy = f"did you mean {nearest[0]}?" if nearest else "`fedllm` lists them"
    return ConfigError(f"{word}: no such command: {remedy}")


def _complete() -> None:
    """Answer a shell that asks how the line may continue, and end the process.

    The shell sends the line so far and the place of the cursor; argcomplete reads them
    from the environment, as it does `_ARGCOMPLETE`, the number of words to skip.
    """
    import argcomplete

    line, skipped = os.environ["COMP_LINE"], int(os.environ["_ARGCOMPLETE"])
    # A word that the cursor still touches is not finished.
    finished = line[: int(os.environ["COMP_POINT"])].rpartition(" ")[0].split()
    command = finished[skipped] if len(finished) > skipped else None
    if command in COMMANDS:
        os.environ["_ARGCOMPLETE"] = str(skipped + 1)
        parser = _module(command).parser()
    else:
        parser = new_parser("", None)
        parser.add_argument("--version", action="store_true")
        parser.add_argument("command", choices=COMMANDS)
    argcomplete.autocomplete(parser)


if __name__ == "__main__":
    main()
