"""The demo's page answers to its own names, and to no other page of the web."""

import asyncio

import pytest

from fedllm.commands.demo_host import OwnHostOnly

PORT = 7860


def answered(kind: str, *headers: tuple[str, str], port: int = PORT):
    """Return what is sent for a request, and whether the page saw it."""
    sent, seen = [], []

    async def page(scope, receive, send):
        seen.append(scope)

    async def send(message):
        sent.append(message)

    pairs = [(name.encode(), value.encode()) for name, value in headers]
    scope = {"type": kind, "headers": pairs}
    asyncio.run(OwnHostOnly(page, port)(scope, None, send))
    return sent, bool(seen)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "LOCALHOST", "[::1]"])
@pytest.mark.parametrize("kind", ["http", "websocket"])
def test_the_page_answers_to_the_names_of_this_machine(host, kind):
    name = f"{host}:{PORT}"

    assert answered(kind, ("host", name)) == ([], True)
    assert answered(kind, ("host", name), ("origin", f"http://{name}")) == ([], True)


FOREIGN = {
    "another name": [("host", f"evil.example:{PORT}")],
    "another name with its own origin": [
        ("host", f"evil.example:{PORT}"),
        ("origin", f"http://evil.example:{PORT}"),
    ],
    "a name that begins like ours": [("host", f"localhost.evil.example:{PORT}")],
    "another port": [("host", "127.0.0.1:80")],
    "no port": [("host", "127.0.0.1")],
    "every interface": [("host", f"0.0.0.0:{PORT}")],
    "no name": [],
    "two names": [("host", f"127.0.0.1:{PORT}"), ("host", "evil.example")],
    "another page": [
        ("host", f"127.0.0.1:{PORT}"),
        ("origin", "http://evil.example"),
    ],
    "another server of this machine": [
        ("host", f"127.0.0.1:{PORT}"),
        ("origin", "http://127.0.0.1:8000"),
    ],
    "a file": [("host", f"127.0.0.1:{PORT}"), ("origin", "null")],
}


@pytest.mark.parametrize("headers", FOREIGN.values(), ids=FOREIGN)
def test_a_foreign_request_is_rejected_before_the_page_sees_it(headers):
    (start, body), seen = answered("http", *headers)
    assert (start["status"], seen) == (403, False)
    assert b"127.0.0.1" in body["body"]

    (close,), seen = answered("websocket", *headers)
    assert (close["type"], seen) == ("websocket.close", False)


def test_browsers_leave_out_the_port_of_http():
    assert answered("http", ("host", "localhost"), port=80) == ([], True)


def test_the_start_of_the_server_passes():
    assert answered("lifespan") == ([], True)
