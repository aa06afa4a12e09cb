"""A node runs an app that its owner chose, and no other."""

import hashlib
import io
import shutil
import zipfile
from pathlib import Path

import pytest

from fedllm.errors import NodeError
from fedllm.node import delivered_app
from fedllm.node.delivered_app import ANY, INSTALLED, parse_pin, require_chosen

SETTINGS = '[tool.flwr.app.components]\nclientapp = "fedllm.client_app:app"\n'


@pytest.fixture
def files(tmp_path, monkeypatch) -> dict[str, str]:
    """The files of an app that equals a small installed package."""
    package = tmp_path / "installed" / "fedllm"
    (package / "client").mkdir(parents=True)
    inside = {"__init__.py": "", "client_app.py": "app = 1\n", "client/log.py": "x = 1"}
    for name, text in inside.items():
        (package / name).write_text(text)
    shutil.copytree(package / "client", package / "data" / "__pycache__")
    (package / "data" / "__pycache__" / "log.py").unlink()
    monkeypatch.setattr(delivered_app.fedllm, "__file__", str(package / "__init__.py"))
    sent = {f"fedllm/{name}": text for name, text in inside.items()}
    return sent | {"pyproject.toml": SETTINGS, "LICENSE": "any"}


def bundle(files: dict[str, str]) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return stream.getvalue()


def test_an_app_that_equals_the_installed_package_may_run(files):
    require_chosen(bundle(files), INSTALLED)
    require_chosen(bundle({**files, "LICENSE": "other"}), INSTALLED)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("fedllm/client_app.py", "app = 2\n"),
        ("fedllm/client_app.py", None),
        ("fedllm/more.py", "x = 1"),
        ("fedllm/client_app.py", "app = 1\n" * 1000),
        ("fedllm/../fedllm/client_app.py", "app = 1\n"),
        ("pyproject.toml", SETTINGS.replace("client_app:", "other:")),
        ("pyproject.toml", "[tool]"),
        ("pyproject.toml", "\x00"),
        ("pyproject.toml", None),
    ],
)
def test_an_app_that_differs_in_a_byte_a_file_or_its_client_is_refused(
    files, name, text
):
    changed = {**files, name: text}
    if text is None:
        del changed[name]

    with pytest.raises(NodeError):
        require_chosen(bundle(changed), INSTALLED)
    require_chosen(bundle(changed), ANY)


@pytest.mark.parametrize("app", [b"", b"PK\x03\x04 broken"])
def test_what_is_no_bundle_is_refused(files, app):
    with pytest.raises(NodeError, match="cannot be read"):
        require_chosen(app, INSTALLED)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_name_that_stands_twice_is_refused(files):
    stream = io.BytesIO(bundle(files))
    with zipfile.ZipFile(stream, "a") as archive:
        archive.writestr("fedllm/client_app.py", files["fedllm/client_app.py"])

    with pytest.raises(NodeError, match="stands twice"):
        require_chosen(stream.getvalue(), INSTALLED)


def test_a_pin_allows_one_app_by_all_of_its_hash(files):
    app = bundle({**files, "fedllm/more.py": "x = 1"})
    pin = hashlib.sha256(app).hexdigest()
    require_chosen(app, parse_pin(pin.upper()))

    with pytest.raises(NodeError, match="runs the app .* alone"):
        require_chosen(app, pin[:-1] + ("0" if pin[-1] != "0" else "1"))
    with pytest.raises(NodeError, match="64 hex digits"):
        parse_pin(pin[:8])


@pytest.mark.filterwarnings("ignore:GitWildMatchPattern:DeprecationWarning")
def test_the_app_of_this_checkout_equals_the_package_of_this_checkout():
    from flwr.cli.build import build_fab_from_disk

    root = Path(__file__).parent.parent.parent
    require_chosen(build_fab_from_disk(root), INSTALLED)
