"""The folder that Flower runs as an app: a checkout, or one made out of the package.

    >>> app_folder(fedllm_home())
    PosixPath('/home/you/.fedllm/app/fedllm-5d0a3f5c8c1f7c1e')

Flower bundles a folder with a pyproject.toml. A checkout is one. An installed package has
that file among its metadata, so that the folder can be made anew beside the models.
"""

import hashlib
import tomllib
from importlib import metadata
from pathlib import Path

import fedllm
from fedllm.atomic_files import create_once
from fedllm.errors import FedllmError

_SETTINGS = "pyproject.toml"
_LICENSE = "LICENSE"


def app_folder(home: Path) -> Path:
    """Return the folder of the app that this Python imports.

    Args:
        home: Where the folder is made if there is no checkout (`fedllm_home()`). It is
            made once for each content, so a newer package never runs an older one's code.

    Raises:
        FedllmError: There is no checkout, and the package was not installed whole or the
            folder cannot be written.
    """
    package = Path(fedllm.__file__).parent
    if _is_checkout(package.parent):
        return package.parent
    files = _installed(package)
    digest = hashlib.sha256()
    for name, content in sorted(files.items()):
        digest.update(f"{name}\0{len(content)}\0".encode())
        digest.update(content)

    def write(folder: Path) -> None:
        for name, content in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)

    # Flower takes letters, digits and hyphens in a folder's name, 32 at most.
    folder = home / "app" / f"fedllm-{digest.hexdigest()[:16]}"
    try:
        return create_once(folder, write)
    except OSError as error:
        raise FedllmError(
            f"{folder}: cannot be written: {error.strerror}; free some space, or set"
            " FEDLLM_HOME to another folder"
        ) from None


def _is_checkout(folder: Path) -> bool:
    """Return whether a folder has our pyproject.toml."""
    try:
        content = tomllib.loads((folder / _SETTINGS).read_text("utf-8"))
    except (OSError, ValueError):
        return False
    return bool(content.get("project", {}).get("name") == "fedllm")


def _installed(package: Path) -> dict[str, bytes]:
    """Return the app's files, by their paths in the app's folder.

    Raises:
        FedllmError: The package's metadata is missing, or older than this code.
    """
    files = {}
    for name, place in ((_SETTINGS, "extra_metadata"), (_LICENSE, "licenses")):
        try:
            content = metadata.distribution("fedllm").read_text(f"{place}/{name}")
        except metadata.PackageNotFoundError:
            content = None
        if content is None:
            raise FedllmError(
                f"{package}: neither a checkout nor an installed package (no {name}):"
                " install fedllm with pip, or run in its checkout"
            )
        files[name] = content.encode()
    for path in package.rglob("*"):
        if path.is_file() and "__pycache__" not in path.parts:
            files[f"fedllm/{path.relative_to(package).as_posix()}"] = path.read_bytes()
    return files
