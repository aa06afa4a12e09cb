"""Flower's SuperLink: the command line of a deployment's, and its database."""

import contextlib
import sqlite3
from collections.abc import Sequence
from pathlib import Path

from fedllm.errors import ConfigError, FederationError
from fedllm.strict_modes import require_strict_modes

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
        ConfigError: The keys are missing, or another user may write them or the state.
    """
    # The names of databases that are no file begin so.
    if not database.startswith(":"):
        require_strict_modes(Path(database).expanduser())
    arguments = ["--port", str(port), "--database", database]
    if keys is not None:
        arguments += _transport(keys)
    elif not any(word.partition("=")[0] in _OWN_TRANSPORT for word in others):
        raise ConfigError(
            "--keys: is needed: the folder that `fedllm keys` makes (or --insecure, for "
            "a trial on one machine)"
        )
    return [*arguments, *others]


def wipe_database(path: Path) -> None:
    """Remove what the SuperLink deleted from its database but SQLite still holds.

    SQLite leaves deleted rows, collected updates among them, in free pages and in the
    files `-wal` and `-shm`. Rows that nobody has deleted stay.

    Args:
        path: The database of a SuperLink that has ended.

    Raises:
        FederationError: There is no such database, or a SuperLink has it open.
    """
    try:
        with contextlib.closing(
            sqlite3.connect(f"{path.absolute().as_uri()}?mode=rw", uri=True, timeout=0)
        ) as database:
            database.execute("PRAGMA secure_delete = ON")
            database.execute("VACUUM")
            # It copies the log back and deletes both files, if nobody else has it open.
            database.execute("PRAGMA journal_mode = DELETE")
    except sqlite3.Error as error:
        raise FederationError(
            f"{path}: cannot be wiped: {error}: name the database of a SuperLink that"
            " has ended"
        ) from None


def _transport(keys: Path) -> list[str]:
    """Return the arguments for TLS and for nodes' keys.

    Raises:
        ConfigError: A file is missing, or another user may write it.
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
    for path in files.values():
        require_strict_modes(path)
    pairs = [word for flag, path in files.items() for word in (flag, str(path))]
    return [*pairs, "--enable-supernode-auth"]
