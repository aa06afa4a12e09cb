"""Text that a stranger wrote, made fit for a line of a log, a terminal or a file.

A client, a run folder or an adapter that came from elsewhere may hold terminal escapes, line
breaks and marks that turn the direction of reading: a line so made cannot be told from one of
our own. OpenSSH prints all foreign text through `strnvis` for that reason, and this is ours.
"""

import re

FOREIGN_TEXT_LIMIT = 300
"""Most characters that are kept of a stranger's text in one line."""

_CUT = "..."
# Printable by Unicode, and yet nothing is seen of them: fillers and variation selectors.
_UNSEEN = re.compile(
    "[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u3164\ufe00-\ufe0f\uffa0"
    "\U000e0100-\U000e01ef]"
)


def printable(
    text: object, limit: int | None = FOREIGN_TEXT_LIMIT, keep: str = ""
) -> str:
    r"""Return foreign text in which every character can be seen, on one line.

    Control characters, line and paragraph separators, marks of direction, characters of no
    width, lone surrogates and code points without a meaning become `\xNN`, `\uNNNN` or
    `\UNNNNNNNN`. Applied twice it gives the same.

    Args:
        text: What a stranger wrote; another value than text is converted.
        limit: Most characters of the result, of which the last three are dots if it was
            cut; None: no limit.
        keep: Characters that stay as they are.
    """
    whole = str(text)
    # An escape is longer than its character, so no more than these can be kept.
    head = whole if limit is None else whole[: limit + 1]
    shown = "".join(c if c in keep or _is_seen(c) else _escape(c) for c in head)
    if limit is not None and len(shown) > limit:
        return shown[: limit - len(_CUT)] + _CUT
    return shown


def _is_seen(character: str) -> bool:
    return character.isprintable() and not _UNSEEN.match(character)


def _escape(character: str) -> str:
    code = ord(character)
    if code < 0x100:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
