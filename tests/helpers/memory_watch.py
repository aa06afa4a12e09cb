"""Looks into a program's memory again and again, in a process of its own.

    python -m tests.helpers.memory_watch FLWR_HOME PROGRAM HEX...

A line a look: 1 if the memory that the program may write holds any of the bytes, else 0.
"""

import contextlib
import sys
import time
from collections.abc import Sequence
from pathlib import Path

_CHUNK = 1 << 24


def main(flwr_home: str, program: str, *marks: str) -> None:
    wanted = [bytes.fromhex(mark) for mark in marks]
    while True:
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                mine = f"FLWR_HOME={flwr_home}".encode()
                if mine not in (folder / "environ").read_bytes().split(b"\0"):
                    continue
                line = (folder / "cmdline").read_bytes().decode()
                if program in line and "memory_watch" not in line:
                    print(int(holds(folder, wanted)), flush=True)
        time.sleep(0.1)


def holds(folder: Path, wanted: Sequence[bytes]) -> bool:
    """Whether a process has any of these bytes in memory that it may write."""
    overlap = max(map(len, wanted))
    with (folder / "mem").open("rb", 0) as memory:
        for line in (folder / "maps").read_text().splitlines():
            span, rights, *_ = line.split()
            start, end = (int(part, 16) for part in span.split("-"))
            if not rights.startswith("rw"):
                continue
            for place in range(start, end, _CHUNK):
                # A region that was given back meanwhile cannot be read, and holds nothing.
                with contextlib.suppress(OSError, ValueError, OverflowError):
                    memory.seek(place)
                    content = memory.read(min(_CHUNK + overlap, end - place))
                    if any(mark in content for mark in wanted):
                        return True
    return False


if __name__ == "__main__":
    main(*sys.argv[1:])
