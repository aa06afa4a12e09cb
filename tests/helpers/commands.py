"""Commands as a shell would run them, in this process."""

from collections.abc import Callable, Sequence


def exit_status(main: Callable[[list[str]], None], arguments: Sequence[str]) -> object:
    """Return a command's exit status, or the error that it ends with."""
    try:
        main(list(arguments))
    except SystemExit as ended:
        return ended.code
    return 0
