"""Run a simulation in processes of its own, which nobody else can steer.

    fedllm simulate --clients 20
    fedllm simulate --clients 20 --run-config configs/private-20.toml

`flwr run` alone starts a SuperLink that outlives it on a fixed port and executes what any
user of the machine posts there, and joins one that another folder or environment left.
This command runs the same engine without a SuperLink, with the packages of this
environment, and ends all that it started. The exit status is 1 if the run failed.
"""

import argparse
import json
import re
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from fedllm.commands.options import (
    add_json,
    add_run_config,
    main_of,
    new_parser,
    positive_int,
    read_settings,
    read_values,
    write_json,
)
from fedllm.config import fedllm_home
from fedllm.config_parsing import parse_run_config
from fedllm.deployment.flower_programs import make_home
from fedllm.deployment.simulation import Simulation, find_app, simulate
from fedllm.runs.directory import RESULT_FILE, read_json


def run(args: argparse.Namespace) -> int:
    """Run the simulation; with --json print where it ran and its result."""
    signal.signal(signal.SIGTERM, _interrupt)
    make_home(None)
    app = find_app(args.app, fedllm_home())
    _require_person_column(args.run_config)
    with tempfile.TemporaryDirectory(prefix="fedllm-flwr-") as folder:
        home = Path(folder)
        simulation = Simulation(
            app, args.clients, args.client_cpus, _run_config(args.run_config, home)
        )
        if not args.json:
            return simulate(simulation, home)
        log = _Log()
        status = simulate(simulation, home, log)
    write_json({"completed": status == 0, **log.report()})
    return status


def _require_person_column(values: Sequence[str]) -> None:
    """Check that a simulation's rows name persons, before anything is started.

    Here all rows are on this machine, so an error may depend on them. A client of a
    federation trains on noise instead, and its own log has the reason.

    Raises:
        ConfigError: The settings cannot be read.
        DataError: No row has the column, or the rows cannot be read.
    """
    settings = read_settings(values)
    if settings.get("data.person-column"):
        from fedllm.data.records import require_person_column

        require_person_column(parse_run_config(settings).data)


class _Log:
    """The run's log on standard error, and the run folder that it names."""

    def __init__(self) -> None:
        self._folder: str | None = None

    def __call__(self, line: str) -> None:
        """Copy a line."""
        sys.stderr.write(line)
        if match := re.search(r"run folder: (.+)", line):
            self._folder = match[1].strip()

    def report(self) -> dict[str, object]:
        """Return the run folder and its result, each null if there is none."""
        result = Path(self._folder or "") / RESULT_FILE
        return {
            "folder": self._folder,
            "result": read_json(result) if self._folder and result.exists() else None,
        }


def _run_config(values: Sequence[str], home: Path) -> Sequence[str]:
    """Return one file of all values: Flower takes a file or pairs, and never both.

    Raises:
        ConfigError: A part of the text is no pair. Flower would pass over it.
    """
    if not values:
        return values
    # A JSON scalar is a TOML scalar.
    pairs = read_values(values).items()
    path = home / "run-config.toml"
    path.write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in pairs))
    return [str(path)]


def _interrupt(*_: object) -> None:
    """Handle a request to end as Ctrl-C, so that nothing is left running."""
    raise KeyboardInterrupt


def parser() -> argparse.ArgumentParser:
    """Return the command's parser."""
    parser = new_parser("simulate", __doc__)
    parser.add_argument(
        "app",
        nargs="?",
        help="fedllm's folder; default: the current one if it holds an app, else the"
        " installed package",
    )
    parser.add_argument(
        "--clients",
        "--num-supernodes",
        type=positive_int,
        default=20,
        metavar="N",
        help="virtual clients, which Flower calls SuperNodes (default: %(default)s)",
    )
    parser.add_argument(
        "--client-cpus",
        type=positive_int,
        metavar="N",
        help="CPUs of a client, all CPUs over N train at a time, each with its own copy of"
        " the model: as few as memory allows for smollm2-135m-instruct, else 2",
    )
    add_run_config(parser)
    add_json(parser)
    return parser


main = main_of(parser, run)

if __name__ == "__main__":
    main()
