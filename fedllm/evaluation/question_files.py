"""Questions of the user's own, one JSON object a line."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fedllm.errors import DataError


def read_questions(
    path: Path, is_valid: Callable[[Any], bool], form: str
) -> list[dict[str, Any]]:
    """Read the rows of a JSONL file; blank lines are skipped.

    Args:
        path: The file.
        is_valid: Whether a row has the right form. It may raise KeyError or TypeError
            for one that has not.
        form: What a row needs, for the error.

    Raises:
        DataError: The file cannot be read, has no row, or has one of another form; the
            first such line is named.
    """
    rows = []
    for number, line in enumerate(_read(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            valid = is_valid(row)
        except (ValueError, KeyError, TypeError):
            valid = False
        if not valid:
            raise DataError(f"{path}:{number}: needs {form}")
        rows.append(row)
    if not rows:
        raise DataError(f"{path}: has no question")
    return rows


def _read(path: Path) -> str:
    """Return the text of a file."""
    try:
        return path.read_text("utf-8")
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: is not UTF-8 text: {error.reason}") from None
