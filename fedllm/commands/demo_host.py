"""A wall before the demo's page: it answers to this machine's own names only.

A page of the web can have its own name resolve to 127.0.0.1 (DNS rebinding), and its
browser then sends what it asks to the demo, as the demo's own origin. The Host header
gives it away.
"""

from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

_NAMES = ("127.0.0.1", "localhost", "[::1]")
_REFUSAL = b"this page answers on 127.0.0.1 or localhost only, and to itself only\n"


def is_own(headers: Iterable[tuple[bytes, bytes]], port: int) -> bool:
    """Return whether a request names this machine, and comes from no other page.

    Args:
        headers: Of the request, names in lower case, as ASGI gives them.
        port: Where the page is served.
    """
    pairs = list(headers)
    hosts = [value.lower() for name, value in pairs if name == b"host"]
    origins = [value.lower() for name, value in pairs if name == b"origin"]
    allowed = {f"{name}:{port}".encode() for name in _NAMES}
    if port == 80:
        allowed |= {name.encode() for name in _NAMES}
    if len(hosts) != 1 or hosts[0] not in allowed:
        return False
    return all(origin == b"http://" + hosts[0] for origin in origins)


class OwnHostOnly:
    """ASGI middleware that answers 403 to any request that is not the page's own.

    Args:
        app: What is served to the others.
        port: Where the page is served.
    """

    def __init__(self, app: App, port: int) -> None:
        self._app = app
        self._port = port

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request, or reject it; the start and end of the server pass."""
        if scope["type"] == "lifespan" or is_own(scope["headers"], self._port):
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            headers = [(b"content-type", b"text/plain")]
            start = {"type": "http.response.start", "status": 403, "headers": headers}
            await send(start)
            await send({"type": "http.response.body", "body": _REFUSAL})
        else:
            await send({"type": "websocket.close", "code": 1008})
