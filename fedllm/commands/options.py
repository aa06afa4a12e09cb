"""Options that commands share, the settings they name, and the one form of errors."""

import argparse
import json
import logging
import re
import sys
import tomllib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedllm.errors import ConfigError, FedllmError
from fedllm.foreign_text import printable

# fedllm.config imports pydantic, which a list of commands or an option's help need not
# wait for.
if TYPE_CHECKING:
    from fedllm.config import RunConfig, Scalar

# What Flower's parser takes for a pair; it passes over anything between two.
_PAIR = re.compile(r"(\S+?)=('[^']*'|\"[^\"]*\"|\S+)")


def run_command(
    parser: argparse.ArgumentParser,
    run: Callable[[argparse.Namespace], int],
    arguments: Sequence[str] | None = None,
    hands_on: bool = False,
) -> None:
    """Run a command as its own process: any status but 0 ends it.

    Args:
        parser: The command's parser.
        run: Does the work and returns the exit status. It raises
            `argparse.ArgumentError` for options that contradict each other.
        arguments: The command line without the command; None: the process's own.
        hands_on: Whether `args.others` collects, in order, what the parser does not
            know; else that is a wrong command line.

    Raises:
        SystemExit: The status is not 0. A FedllmError is status 1 with its problems on
            stderr, a line each; a wrong command line is status 2, an interrupt 130.
    """
    if hands_on:
        args, others = parser.parse_known_args(arguments)
        args.others = others
    else:
        args = parser.parse_args(arguments)
    try:
        status = run(args)
    except argparse.ArgumentError as error:
        parser.error(str(error))
    except FedllmError as error:
        sys.exit(error_text(error))
    except KeyboardInterrupt:
        sys.exit(130)
    if status:
        sys.exit(status)


def main_of(
    parser: Callable[[], argparse.ArgumentParser],
    run: Callable[[argparse.Namespace], int],
    hands_on: bool = False,
) -> Callable[..., None]:
    """Return a command's `main(arguments)`; the arguments are those of `run_command`."""

    def main(arguments: Sequence[str] | None = None) -> None:
        """Run the command; an error is one line and exit status 1."""
        run_command(parser(), run, arguments, hands_on)

    return main


def error_text(error: FedllmError) -> str:
    """Return an error as lines of one form: `ConfigError: key: what is wrong`."""
    kind = type(error).__name__
    lines = str(error).split("\n")
    return "\n".join(f"{kind}: {printable(line, limit=None)}" for line in lines)


def new_parser(
    name: str, description: str | None, hands_on: bool = False
) -> argparse.ArgumentParser:
    """Return a command's parser.

    Args:
        name: The command's name, as in `fedllm NAME`.
        description: Text above the options, printed as it is.
        hands_on: Whether unknown arguments are another program's, --help among them.
    """
    return argparse.ArgumentParser(
        prog=f"fedllm {name}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=not hands_on,
        # An abbreviation of our option may be the whole name of another program's.
        allow_abbrev=not hands_on,
    )


def print_help(parser: argparse.ArgumentParser, words: Sequence[str]) -> None:
    """Print a command's help if it is asked for, above another program's own."""
    if {"-h", "--help"} & {*words}:
        sys.stdout.write(parser.format_help() + "\n")
        sys.stdout.flush()


def add_run_config(
    parser: "argparse.ArgumentParser | argparse._MutuallyExclusiveGroup",
) -> None:
    """Add `--run-config`, which may be given more than once."""
    parser.add_argument(
        "--run-config",
        action="append",
        default=[],
        metavar="CONFIG",
        help="settings over pyproject.toml's: a TOML file or key=value pairs, as for"
        " flwr run",
    )


def add_clients(parser: argparse.ArgumentParser, meaning: str) -> None:
    """Add `--clients`, a number whose default the command decides."""
    parser.add_argument("--clients", type=int, metavar="N", help=meaning)


def add_out(
    parser: argparse.ArgumentParser, meaning: str, required: bool = False
) -> None:
    """Add `--out`, the folder that the command writes."""
    parser.add_argument("--out", required=required, metavar="DIR", help=meaning)


def add_fetch_base(parser: argparse.ArgumentParser) -> None:
    """Add the option that lets a hub be asked for what an adapter names as its base."""
    parser.add_argument(
        "--fetch-base",
        action="store_true",
        help="fetch the base that the adapter names, if this machine lacks it",
    )


def add_json(parser: argparse.ArgumentParser) -> None:
    """Add `--json`: one JSON object instead of text."""
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object, for programs"
    )


def add_home(parser: argparse.ArgumentParser, content: str) -> None:
    """Add `--home`, the folder that FEDLLM_HOME names otherwise.

    Args:
        parser: The command's parser.
        content: What the command keeps there, in words.
    """
    parser.add_argument(
        "--home",
        metavar="DIR",
        help=f"folder of {content} (default: FEDLLM_HOME, else ~/.fedllm)",
    )


def add_answers(parser: argparse.ArgumentParser, default_bits: str) -> None:
    """Add the options of a model that answers: length, temperature, quantisation.

    Args:
        parser: The command's parser.
        default_bits: What `--quantization` is if it is not given, in words.
    """
    parser.add_argument(
        "--max-new-tokens",
        type=positive_int,
        default=96,
        metavar="N",
        help="length of an answer at most (default: %(default)s)",
    )
    parser.add_argument(
        "--temperature",
        type=temperature,
        default=0.0,
        help="0.0: always the likeliest token",
    )
    parser.add_argument(
        "--quantization",
        type=int,
        choices=(0, 4, 8),
        help=f"bits of the base; default: {default_bits}",
    )


def write_json(content: object) -> None:
    """Write one JSON value to standard output."""
    sys.stdout.write(json.dumps(content, indent=2) + "\n")


def log_to_stderr() -> None:
    """Print warnings of the package and its libraries as plain lines on stderr."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)


def read_run_config(values: Sequence[str] = ()) -> "RunConfig":
    """Return the run config as `flwr run .` here would have it.

    Args:
        values: Values of `--run-config`.

    Raises:
        ConfigError: A value cannot be read, or the settings are not valid.
    """
    from fedllm.config_parsing import parse_run_config

    return parse_run_config(read_settings(values))


def read_settings(values: Sequence[str] = ()) -> "dict[str, Scalar]":
    """Return flat settings: the defaults, then ./pyproject.toml's, then the values.

    Args:
        values: Values of `--run-config`: paths of .toml files, or key=value pairs.

    Raises:
        ConfigError: A file or a text cannot be read.
    """
    from fedllm.config import RunConfig, flat

    settings: dict[str, Scalar] = flat(RunConfig())
    project = Path("pyproject.toml")
    if project.is_file():
        content: Any = _read_toml(project)
        for key in ("tool", "flwr", "app", "config"):
            content = content.get(key, {})
        settings.update(_joined(content))
    return settings | read_values(values)


def read_values(values: Sequence[str]) -> "dict[str, Scalar]":
    """Return what the values of `--run-config` set, flat; a later one wins.

    Raises:
        ConfigError: A file or a text cannot be read.
    """
    settings: dict[str, Scalar] = {}
    for value in values:
        if value.endswith(".toml"):
            settings.update(_joined(_read_toml(Path(value).expanduser())))
        elif "=" in value:
            settings.update(parse_pairs(value, "--run-config"))
        else:
            raise ConfigError(
                f"--run-config: needs a .toml file or key=value pairs (got {value!r})"
            )
    return settings


def _read_toml(path: Path) -> dict[str, Any]:
    """Read a TOML file."""
    try:
        return tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        raise ConfigError(
            f"--run-config: {path}: cannot be read: {error.strerror}"
        ) from None
    except ValueError as error:
        raise ConfigError(f"--run-config: {path}: is not TOML: {error}") from None


def _joined(nested: Mapping[str, Any], prefix: str = "") -> "dict[str, Scalar]":
    """Join the keys of nested tables by dots, as Flower does."""
    settings: dict[str, Scalar] = {}
    for key, value in nested.items():
        if isinstance(value, Mapping):
            settings.update(_joined(value, f"{prefix}{key}."))
        else:
            settings[prefix + key] = value
    return settings


def parse_pairs(text: str, option: str) -> "dict[str, Scalar]":
    """Parse key=value pairs by Flower's own parser, which costs a second to import.

    Args:
        text: What was typed.
        option: Where, for the error.

    Raises:
        ConfigError: A part of the text is no pair: Flower's parser passes over it, and a
            setting or a limit would be lost. Or a value is none of TOML's.
    """
    from click import ClickException
    from flwr.common.config import parse_config_args

    rest = _PAIR.sub("", text).split()
    if rest:
        raise ConfigError(
            f"{option}: {rest[0]!r} is not part of a key=value pair (got {text!r}): "
            "no space beside =, and quotes around text"
        )
    try:
        return dict(parse_config_args([text]))
    except (ClickException, ValueError) as error:
        reason = getattr(error, "message", error)
        raise ConfigError(f"{option}: {reason}") from None


def positive_int(text: str) -> int:
    """Read a whole number of at least 1; argparse shows the error."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1 (got {text})")
    return value


def positive_float(text: str) -> float:
    """Read a finite number above 0; argparse shows the error."""
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be finite and above 0 (got {text})")
    return value


def temperature(text: str) -> float:
    """Read a finite number of at least 0; argparse shows the error."""
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be finite and at least 0 (got {text})")
    return value
