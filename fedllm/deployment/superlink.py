"""Flower's SuperLink: the command line of a deployment's."""

from collections.abc import Sequence
from pathlib import Path

from fedllm.errors import ConfigError

# Each makes the caller responsible for TLS, and --keys needless.
_OWN_TRANSPORT = ("--insecure", "--ssl-certfile")


def superlink_arguments(
    keys: Path | None, port: int, database: str, others: Sequence[str]
) -> list[str]:
    """Return the arguments of `flower-superlink` for a deployment.

    Args:
        keys: The folder that `fedllm keys` made, or the server's three files of it; None
            if the other arguments say how the SuperLink is reached.
        port: Where it listens, on loopback: the gate forwards to it.
        database: Its state, with the clients' updates until each is collected.
        others: Arguments that are handed on. They come last, so that they win.

    Raises:
        ConfigError: The keys are missing.
    """
    arguments = ["--port", str(port), "--database", database]
    if keys is not None:
        arguments += _transport(keys)
    elif not any(word.partition("=")[0] in _OWN_TRANSPORT for word in others):
        raise ConfigError(
            "--keys: is needed: the folder that `fedllm keys` makes (or --insecure, for "
            "a trial on one machine)"
        )
    return [*arguments, *others]


def _transport(keys: Path) -> list[str]:
    """Return the arguments for TLS and for nodes' keys.

    Raises:
        ConfigError: A file is missing.
    """
    files = {
        "--ssl-ca-certfile": keys / "ca.crt",
        "--ssl-certfile": keys / "server.crt",
        "--ssl-keyfile": keys / "server.key",
    }
    missing = [str(path) for path in files.values() if not path.is_file()]
    if missing:
        raise ConfigError(
            f"--keys: there is no {', '.join(missing)}: make the folder by `fedllm keys`"
        )
    pairs = [word for flag, path in files.items() for word in (flag, str(path))]
    return [*pairs, "--enable-supernode-auth"]
