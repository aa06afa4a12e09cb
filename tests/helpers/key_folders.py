"""Folders of deployment keys, and what they hold."""

import socket
import ssl
import threading

from fedllm.commands import keys


def make(folder, *more: str) -> None:
    others = {"--add-node", "--add-reviewer", "--add-trustee"}
    others |= {"--write-gate", "--check", "--renew-server"}
    name = [] if others & {*more} else ["--server-name", "fl.example.org"]
    keys.main(["--out", str(folder), *name, *more])


def contents(folder) -> dict:
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def handshake(folder, server_name: str) -> str:
    """Shake hands as Python's strictest client does; return the protocol's version."""
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(folder / "server.crt", folder / "server.key")
    client = ssl.create_default_context(cafile=folder / "ca.crt")
    client.verify_flags |= ssl.VERIFY_X509_STRICT
    ours, theirs = socket.socketpair()

    def serve() -> None:
        try:
            with server.wrap_socket(theirs, server_side=True) as tls:
                tls.recv(1)
        except OSError:
            theirs.close()

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        with client.wrap_socket(ours, server_hostname=server_name) as tls:
            return str(tls.version())
    finally:
        ours.close()
        thread.join(10)
