"""Weights that are mapped from a file: their pages are released layer by layer.

A quantised base is mapped from the cache on disk: the system reads a page at its first use,
and may drop it when memory is short. Until then the page counts as the process's memory. A
step uses every weight, and so the process grows to the base's size. If activations are
computed again to save memory, weights are read again too: from the page cache, which still
has them, or from disk.
"""

import ctypes
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

_DONT_NEED = 4
"""MADV_DONTNEED of Linux: a page of a file is read again at its next use."""


@contextmanager
def release_mapped_pages(model: torch.nn.Module) -> Iterator[None]:
    """Release the pages of a model's mapped weights before each part of a layer.

    Layers are those that transformers' gradient checkpointing runs again. Before each of
    their parts all that was read of the file is released, and read again by the layer that
    needs it. Without mapped weights, and on systems other than Linux, nothing is done.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    ranges = _unwritten(mapped_ranges(model))

    def release(*_: Any) -> None:
        for start, stop in ranges:
            _release(start, stop)

    with ExitStack() as stack:
        if ranges:
            for module in model.modules():
                # When it runs again, its own hooks are not called; its parts' are.
                if isinstance(module, GradientCheckpointingLayer):
                    for child in module.children():
                        hook = child.register_forward_pre_hook(release)
                        stack.callback(hook.remove)
        yield


def mapped_ranges(model: torch.nn.Module) -> list[tuple[int, int]]:
    """Return (first address, the one after the last) of each mapping that holds weights."""
    weights = [p.data_ptr() for p in model.parameters() if p.device.type == "cpu"]
    ranges = []
    for line in _lines("maps"):
        mapped = re.match(r"([0-9a-f]+)-([0-9a-f]+) r\S+ \S+ \S+ [1-9]\d* +/", line)
        if mapped is not None:
            start, stop = int(mapped[1], 16), int(mapped[2], 16)
            if any(start <= weight < stop for weight in weights):
                ranges.append((start, stop))
    return ranges


def _unwritten(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return the ranges of which no page was written: the file has no written values."""
    heads = {f"{start:x}-{stop:x}": (start, stop) for start, stop in ranges}
    unwritten, current = [], None
    for line in _lines("smaps"):
        first = line.split(" ", 1)[0]
        if re.fullmatch(r"[0-9a-f]+-[0-9a-f]+", first):
            current = heads.get(first)
        elif current is not None and re.fullmatch(r"Anonymous: +0 kB", line):
            unwritten.append(current)
    return unwritten


def _release(start: int, stop: int) -> None:
    """Release the pages of a range of addresses."""
    failed = ctypes.CDLL(None, use_errno=True).madvise(
        ctypes.c_void_p(start), ctypes.c_size_t(stop - start), _DONT_NEED
    )
    if failed:
        raise OSError(
            ctypes.get_errno(),
            "madvise: the pages of mapped weights cannot be released",
        )


def _lines(name: str) -> list[str]:
    """Return the lines of a file in /proc/self; none if the system has no such file."""
    try:
        return (Path("/proc/self") / name).read_text("utf-8", "replace").splitlines()
    except OSError:
        return []
