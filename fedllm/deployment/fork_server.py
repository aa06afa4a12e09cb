"""A process that has imported what a client needs, and forks one for each message.

Flower starts a new `flwr-clientapp` for every message, and spends most of the time until
its first training step on imports. `fedllm supernode` puts a program of that name
(`programs/`) first on the SuperNode's PATH, which hands its arguments to this process
(`fork_client.py`). The child that is forked runs Flower's own `flwr-clientapp` behind a guard
(`guarded_client.py`): one process a message, with nothing left of another message. If this
process does not answer, `fork_client.py` becomes the same, which imports the libraries itself.
"""

import contextlib
import gc
import json
import logging
import os
import selectors
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

from fedllm.deployment.fork_client import TAKEN
from fedllm.errors import FedllmError
from fedllm.logs import show_log

# As a program this module is called __main__.
logger = logging.getLogger("fedllm.deployment.fork_server")

_CLIENTAPP = "flwr-clientapp"
_ENDS = (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM)
_STANDARD_STREAMS = 3
_LARGEST_READ = 65_536
_LARGEST_REQUEST = 1_048_576
_SECONDS_TO_END = 10
_SECONDS_TO_ASK = 5
_SECONDS_TO_TRY_CUDA = 60
# In the place of a server of half a GB.
_WAITER = """
import os, shutil, sys
os.read(int(sys.argv[1]), 1)
shutil.rmtree(sys.argv[2], ignore_errors=True)
"""


def main() -> None:
    """Serve until the SuperNode has ended, or, in a child, run one message's client.

    Arguments are the folder of the socket and two descriptors: the listening socket,
    and a pipe that nobody writes to and that closes with the SuperNode.
    """
    folder, listener, alive = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    show_log()
    # What ends a group of processes is for the SuperNode first, whose end ends this.
    before = {end: signal.signal(end, signal.SIG_IGN) for end in _ENDS}
    argv = None
    with socket.socket(fileno=listener) as listening:
        try:
            clientapp = _imported()
            if clientapp is not None:
                logger.info("clients are forked by process %d", os.getpid())
                argv = _Server(listening, alive, before).serve()
        except Exception as error:  # noqa: BLE001 - no worse than without a server
            logger.warning("each client imports its libraries itself: %r", error)
    if argv is None or clientapp is None:
        # Clients ask at this path for as long as the SuperNode lives: nobody else may come
        # to own its name and get their tokens.
        waiter = [sys.executable, "-I", "-S", "-c", _WAITER, str(alive), folder]
        os.execv(sys.executable, waiter)
    sys.argv = [_CLIENTAPP, *argv]
    clientapp()


def _imported() -> Callable[[], None] | None:
    """Import a client's libraries; return Flower's command, or None to fork nothing."""
    # Otherwise torch counts GPUs through CUDA, after which no child could use CUDA.
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    import torch

    from fedllm.client.preload import import_libraries
    from fedllm.deployment.guarded_client import main as clientapp

    has_gpu = torch.cuda.is_available()
    try:
        # bitsandbytes asks CUDA for the devices' properties.
        import_libraries(quantized=not has_gpu, per_example=False)
    except FedllmError as error:
        # Each client reports it in its reply.
        logger.warning("%s", error)
        return None
    if has_gpu and not _cuda_survives_a_fork():
        logger.warning(
            "each client imports its libraries itself: CUDA cannot be used in a process "
            "that was forked from one that has imported them"
        )
        return None
    # A pinned app brings its own fedllm along.
    for name in list(sys.modules):
        if name == "fedllm" or name.startswith("fedllm."):
            del sys.modules[name]
    # Children share the pages that are never written to: a collection would write them.
    gc.collect()
    gc.freeze()
    return clientapp


def _cuda_survives_a_fork() -> bool:
    """Return whether a child can use CUDA; only trying shows what imports initialised."""
    import torch

    pid = os.fork()
    if not pid:
        try:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(_SECONDS_TO_TRY_CUDA)
            # torch has no types for it.
            torch.cuda.init()  # type: ignore[no-untyped-call]
            os._exit(0)
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


class _Server:
    """Forks a child for each connection, and sends the child's status over it."""

    def __init__(
        self, listening: socket.socket, alive: int, before: dict[signal.Signals, Any]
    ) -> None:
        self._listening = listening
        self._alive = alive
        self._before = before
        self._children: dict[int, socket.socket] = {}
        self._kill_at: dict[int, float] = {}
        self._selector = selectors.DefaultSelector()
        self._woken, self._wake = os.pipe()

    def serve(self) -> list[str] | None:
        """Return None once the SuperNode has ended; in a child, its arguments."""
        for end in (self._woken, self._wake):
            os.set_blocking(end, False)
        signal.set_wakeup_fd(self._wake)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        for source in (self._woken, self._alive, self._listening):
            self._selector.register(source, selectors.EVENT_READ)
        while True:
            ready = self._selector.select(1 if self._kill_at else None)
            self._kill_late_children()
            for key, _ in ready:
                if key.fileobj == self._alive:
                    self._end_children()
                    return None
                if key.fileobj == self._woken:
                    os.read(self._woken, _LARGEST_READ)
                    self._reap()
                elif key.fileobj is self._listening:
                    argv = self._answer()
                    if argv is not None:
                        return argv
                else:
                    self._end_child(key.data)

    def _answer(self) -> list[str] | None:
        """Fork a child, in which the arguments of its message are returned."""
        try:
            connection, _ = self._listening.accept()
        except OSError as error:
            # Out of descriptors: trying again at once would fail again.
            logger.warning("no client was forked: %s", error)
            time.sleep(1)
            return None
        try:
            deadline = time.monotonic() + _SECONDS_TO_ASK
            request, streams = _request(connection, deadline)
            connection.settimeout(None)
        except (OSError, ValueError) as error:
            logger.warning("no client was forked: %s", error)
            connection.close()
            return None
        try:
            return self._fork(connection, request, streams)
        finally:
            for stream in streams:
                os.close(stream)

    def _fork(
        self, connection: socket.socket, request: dict[str, Any], streams: list[int]
    ) -> list[str] | None:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError):
                stream.flush()
        try:
            pid = os.fork()
        except OSError as error:
            # The program that asked becomes Flower's.
            logger.warning("no client was forked: %s", error)
            connection.close()
            return None
        if not pid:
            self._become(request, streams, connection)
            return list(request["argv"])
        self._children[pid] = connection
        self._selector.register(connection, selectors.EVENT_READ, data=pid)
        return None

    def _become(
        self, request: dict[str, Any], streams: list[int], connection: socket.socket
    ) -> None:
        """In the child: take the program's streams, folder and environment only."""
        try:
            self._let_go()
            for number, stream in enumerate(streams):
                os.dup2(stream, number)
            os.chdir(request["folder"])
            os.environ.clear()
            os.environ.update(request["environment"])
            # Otherwise each child would begin with the same states.
            if numpy := sys.modules.get("numpy"):
                numpy.random.seed()
            if torch := sys.modules.get("torch"):
                torch.default_generator.seed()
            # Last, and by the child: a program that gets no byte has no client and becomes
            # Flower's. If the byte cannot be sent, the program has done so, or was ended.
            connection.sendall(TAKEN)
            connection.close()
        except BaseException:  # noqa: BLE001 - a child must not continue as a server
            traceback.print_exc()
            os._exit(1)

    def _let_go(self) -> None:
        """In the child: undo what the server set up."""
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for end, handler in self._before.items():
            signal.signal(end, handler)
        self._selector.close()
        for descriptor in (self._alive, self._woken, self._wake):
            os.close(descriptor)
        for connection in self._children.values():
            connection.close()

    def _reap(self) -> None:
        """Send the status of each child that has ended to its program."""
        for pid in list(self._children):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                connection = self._children.pop(pid)
                self._kill_at.pop(pid, None)
                with contextlib.suppress(KeyError):
                    self._selector.unregister(connection)
                # The program that asked may be gone.
                with connection, contextlib.suppress(OSError):
                    connection.sendall(b"%d" % os.waitstatus_to_exitcode(status))

    def _end_child(self, pid: int) -> None:
        """End a child whose program was ended; its status is read as any other's."""
        if connection := self._children.get(pid):
            self._selector.unregister(connection)
            os.kill(pid, signal.SIGTERM)
            self._kill_at[pid] = time.monotonic() + _SECONDS_TO_END

    def _kill_late_children(self) -> None:
        """Kill each child that does not heed the first signal."""
        for pid, kill_at in list(self._kill_at.items()):
            if time.monotonic() >= kill_at:
                del self._kill_at[pid]
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    def _end_children(self) -> None:
        """End all children, whose SuperNode has ended, and wait for them."""
        deadline = time.monotonic() + _SECONDS_TO_END
        for pid in self._children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
            self._kill_at[pid] = deadline
        while self._children:
            self._reap()
            self._kill_late_children()
            time.sleep(0.05)


def _request(
    connection: socket.socket, deadline: float
) -> tuple[dict[str, Any], list[int]]:
    """Read the request of `fork_client.py`: its streams, then a line of JSON.

    Every other client waits meanwhile, so there is one deadline for the whole of it.
    """
    _wait_until(connection, deadline)
    _, streams, _, _ = socket.recv_fds(connection, 1, _STANDARD_STREAMS)
    try:
        if len(streams) != _STANDARD_STREAMS:
            raise ValueError("a request without its streams")
        line = bytearray()
        while not line.endswith(b"\n"):
            _wait_until(connection, deadline)
            if not (part := connection.recv(_LARGEST_READ)):
                raise ValueError("a request broke off")
            line += part
            if len(line) > _LARGEST_REQUEST:
                raise ValueError("a request is too large")
        return json.loads(line), streams
    except (OSError, ValueError):
        for stream in streams:
            os.close(stream)
        raise


def _wait_until(connection: socket.socket, deadline: float) -> None:
    """Let the next read take no longer than what is left of the time.

    Raises:
        TimeoutError: Nothing is left.
    """
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError("a request took too long")
    connection.settimeout(left)


if __name__ == "__main__":
    main()
