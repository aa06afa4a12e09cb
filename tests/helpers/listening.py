"""What a process and all that it started listen on, and what a stranger can do there."""

import contextlib
import http.client
import json
import os
import socket
import warnings
from dataclasses import dataclass
from ipaddress import ip_address

import grpc
import psutil

NOBODY = 65534


@dataclass(frozen=True)
class Listener:
    """A socket that takes connections or datagrams."""

    program: str
    address: str
    port: int
    is_stream: bool

    def is_local(self) -> bool:
        """Return whether only this machine reaches it; Ray binds IPv4 as mapped IPv6."""
        address = ip_address(self.address)
        mapped = getattr(address, "ipv4_mapped", None)
        return bool((mapped or address).is_loopback)

    def host(self) -> str:
        return self.address.removeprefix("::ffff:")


def listeners(pid: int) -> list[Listener]:
    """Return all that a process and its descendants listen on."""
    root = psutil.Process(pid)
    found = []
    for process in [root, *root.children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            for connection in process.net_connections("inet"):
                is_stream = connection.type == socket.SOCK_STREAM
                if connection.status == psutil.CONN_LISTEN or not is_stream:
                    address = connection.laddr
                    listener = (process.name(), address.ip, address.port, is_stream)
                    found.append(Listener(*listener))
    return found


def posted_by_a_stranger(found: list[Listener], folder: str) -> dict[str, object]:
    """Return what another user of the machine gets: from each port, and from a folder.

    Without root there is no other user to become; then it is this one without a secret,
    and the folder is left out.
    """
    # Loaded when it is first used, from where a stranger may not read.
    "localhost".encode("idna")
    reader, writer = os.pipe()
    with warnings.catch_warnings():
        # Python warns of threads whose locks a child inherits; this one makes a few plain
        # calls. A new program could not be started: a stranger may not read Python here.
        warnings.filterwarnings("ignore", ".*fork", DeprecationWarning)
        child = os.fork()
    if child == 0:
        try:
            answers = _as_a_stranger(found, folder)
        # Whatever it is: else the other tests would continue in the child as well.
        except BaseException as error:  # noqa: BLE001 - see above
            answers = {"failed": repr(error)}
        os.write(writer, json.dumps(answers).encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        text = pipe.read()
    os.waitpid(child, 0)
    return dict(json.loads(text))


def _as_a_stranger(found: list[Listener], folder: str) -> dict[str, object]:
    """Become nobody, look into the folder, and post to each port."""
    answers: dict[str, object] = {"folder": "PermissionError"}
    if os.geteuid() == 0:
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
        try:
            answers["folder"] = os.listdir(folder)
        except OSError as error:
            answers["folder"] = type(error).__name__
    for listener in found:
        answers[f"{listener.program}:{listener.port}"] = _start_run(listener)
    return answers


def _start_run(listener: Listener) -> object:
    """Return the status of a POST that starts a run, or why there is none."""
    connection = http.client.HTTPConnection(listener.host(), listener.port, timeout=5)
    headers = {"Content-Type": "application/protobuf"}
    try:
        connection.request("POST", "/v1/control/start-run", b"", headers)
        return connection.getresponse().status
    except (OSError, http.client.HTTPException) as error:
        return type(error).__name__


def listed_jobs(gcs: Listener, token: str | None) -> str:
    """Return the code of a call to Ray's head: its list of jobs."""
    metadata = [("authorization", f"Bearer {token}")] if token else None
    with grpc.insecure_channel(f"{gcs.host()}:{gcs.port}") as channel:
        call = channel.unary_unary("/ray.rpc.JobInfoGcsService/GetAllJobInfo")
        try:
            call(b"", timeout=20, metadata=metadata)
        except grpc.RpcError as error:
            return str(error.code().name)
    return "OK"
