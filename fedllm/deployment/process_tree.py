"""A process and all that it started, in whatever sessions, ended together."""

import contextlib

import psutil

_GRACE_SECONDS = 20


def end_tree(pid: int) -> None:
    """End a process and all that it started, which may be in sessions of its own."""
    try:
        root = psutil.Process(pid)
        processes = [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    for end in (psutil.Process.terminate, psutil.Process.kill):
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                end(process)
        _, processes = psutil.wait_procs(processes, timeout=_GRACE_SECONDS)
