"""Whether an app that a server delivers is one that the node's owner chose.

A server ships the code of a run to each node, so without this a node runs whatever the
server's operator sends. By default a node runs its own installed package and nothing
else; what was delivered only has to be equal, since server and client of two versions do
not understand each other.
"""

import hashlib
import io
import os
import re
import tomllib
import zipfile
from pathlib import Path

import fedllm
from fedllm.errors import NodeError

CHOICE = "FEDLLM_NODE_APP"
"""Variable of a client's process that holds the owner's choice: installed, any, or a SHA-256."""
INSTALLED = "installed"
ANY = "any"
CLIENT_APP = "fedllm.client_app:app"

_PACKAGE = "fedllm/"
_MOST_SETTINGS = 1_000_000


def parse_pin(text: str) -> str:
    """Return a SHA-256 in small hex digits.

    Raises:
        NodeError: It is none.
    """
    if not re.fullmatch(r"[0-9a-f]{64}", text.lower()):
        raise NodeError(
            f"--pin-app: needs the 64 hex digits of `fedllm keys --app-hash` (got {text!r})"
        )
    return text.lower()


def is_chosen() -> bool:
    """Return whether the app of this process is one that the node's owner chose.

    `fedllm supernode` says so in the environment; a plain `flower-supernode`, and one with
    `--any-app`, run what the server sends.
    """
    return os.environ.get(CHOICE, ANY) != ANY


def require_chosen(app: bytes, choice: str) -> None:
    """Check a delivered app before a file of it is unpacked or imported.

    Args:
        app: The bundle (FAB), a zip file.
        choice: INSTALLED, ANY, or the SHA-256 of the one app that may run.

    Raises:
        NodeError: The node's owner has not chosen it.
    """
    if choice == ANY:
        return
    if choice == INSTALLED:
        _require_installed(app, Path(fedllm.__file__).parent)
        return
    got = hashlib.sha256(app).hexdigest()
    if got != choice:
        raise NodeError(f"app {got}: this node runs the app {choice} alone (--pin-app)")


def _require_installed(app: bytes, package: Path) -> None:
    """Check that an app's package is the one that is installed here, file by file."""
    try:
        with zipfile.ZipFile(io.BytesIO(app)) as bundle:
            differing = _first_difference(bundle, package)
            client_app = _client_app(bundle)
    except (zipfile.BadZipFile, OSError, KeyError, ValueError, TypeError) as error:
        raise NodeError(f"the delivered app cannot be read: {error!r}") from None
    if differing is not None:
        raise NodeError(
            f"{differing}: differs between the delivered app and {package}: install the "
            "server's version here, or pin the app (--pin-app)"
        )
    if client_app != CLIENT_APP:
        raise NodeError(f"the delivered app's client is not {CLIENT_APP}")


def _first_difference(bundle: zipfile.ZipFile, package: Path) -> str | None:
    """Return the first file of the package that is not equal on both sides."""
    names = bundle.namelist()
    sent = {name for name in names if name.startswith(_PACKAGE)}
    if len(sent) != sum(name.startswith(_PACKAGE) for name in names):
        return f"{_PACKAGE} (a name stands twice)"
    code = {
        _PACKAGE + path.relative_to(package).as_posix()
        for path in package.rglob("*.py")
    }
    for name in sorted(sent | code):
        own = package / name.removeprefix(_PACKAGE)
        if name not in sent or ".." in Path(name).parts or not own.is_file():
            return ascii(name)
        # By its size first: a few bytes of a zip file may swell to any size.
        if bundle.getinfo(name).file_size != own.stat().st_size:
            return ascii(name)
        if bundle.read(name) != own.read_bytes():
            return ascii(name)
    return None


def _client_app(bundle: zipfile.ZipFile) -> object:
    """Return what the app's settings name as its client."""
    if bundle.getinfo("pyproject.toml").file_size > _MOST_SETTINGS:
        raise ValueError("pyproject.toml is too large")
    settings = tomllib.loads(bundle.read("pyproject.toml").decode())
    return settings["tool"]["flwr"]["app"]["components"]["clientapp"]
