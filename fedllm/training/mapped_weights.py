"""Weights that are mapped from a file: their memory is given back layer by layer.

A quantised base is mapped from the cache on disk, so the system reads a page when it is
first looked at, and may drop it when memory is short. Until then it counts as the
process's memory: a step looks at every weight, and so the process grows to the base's
size. Where activations are computed again to save memory, weights are looked up again
too: in the page cache, where they still are, or on disk.
"""

import ctypes
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

_DONT_NEED = 4
"""MADV_DONTNEED of Linux: what was read of a file is read again when next looked at."""


@contextmanager
def release_mapped_pages(model: torch.nn.Module) -> Iterator[None]:
    """Let the system have the pages of a model's mapped weights while a layer runs.

    Layers are those that transformers' gradient checkpointing runs again: before each of
    their parts, whatever other layers have read is given back. Without
    mapped weights, and on systems other than Linux, nothing is done.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    ranges = _unwritten(mapped_ranges(model))

    def give_back(*_: Any) -> None:
        for start, stop in ranges:
            _give_back(start, stop)

    with ExitStack() as stack:
        if ranges:
            for module in model.modules():
                # Its own hooks are not called when it is run again; its parts' are.
                if isinstance(module, GradientCheckpointingLayer):
                    for child in module.children():
                        hook = child.register_forward_pre_hook(give_back)
                        stack.callback(hook.remove)
        yield


def mapped_ranges(model: torch.nn.Module) -> list[tuple[int, int]]:
    """Return (first address, the one after the last) of each file that holds weights."""
    weights = [p.data_ptr() for p in model.parameters() if p.device.type == "cpu"]
    found = []
    for line in _lines("maps"):
        mapped = re.match(r"([0-9a-f]+)-([0-9a-f]+) r\S+ \S+ \S+ [1-9]\d* +/", line)
        if mapped is not None:
            start, stop = int(mapped[1], 16), int(mapped[2], 16)
            if any(start <= weight < stop for weight in weights):
                found.append((start, stop))
    return found


def _unwritten(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return the ranges of which no page was written: those would be as in the file."""
    heads = {f"{start:x}-{stop:x}": (start, stop) for start, stop in ranges}
    fine, current = [], None
    for line in _lines("smaps"):
        first = line.split(" ", 1)[0]
        if re.fullmatch(r"[0-9a-f]+-[0-9a-f]+", first):
            current = heads.get(first)
        elif current is not None and re.fullmatch(r"Anonymous: +0 kB", line):
            fine.append(current)
    return fine


def _give_back(start: int, stop: int) -> None:
    done = ctypes.CDLL(None, use_errno=True).madvise(
        ctypes.c_void_p(start), ctypes.c_size_t(stop - start), _DONT_NEED
    )
    if done:
        raise OSError(
            ctypes.get_errno(), "madvise: mapped weights cannot be given back"
        )


def _lines(name: str) -> list[str]:
    """Return the lines of a file of this process's; none where there is no such system."""
    try:
        return (Path("/proc/self") / name).read_text("utf-8", "replace").splitlines()
    except OSError:
        return []
