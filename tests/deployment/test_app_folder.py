"""What Flower runs: the checkout, or a folder made out of an installed package."""

import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

import fedllm
from fedllm.deployment.app_folder import app_folder
from fedllm.errors import FedllmError

ROOT = Path(__file__).parents[2]


class Metadata:
    """The metadata of an installed package, whose files are what the test says."""

    def __init__(self, files: dict[str, str]) -> None:
        self.files = files

    def read_text(self, name: str) -> str | None:
        return self.files.get(name)


WHOLE = {
    "extra_metadata/pyproject.toml": '[project]\nname = "fedllm"\n',
    "licenses/LICENSE": "the licence",
}


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """A package in a folder of packages, and the metadata beside it."""
    package = tmp_path / "site-packages" / "fedllm"
    for name in ("__init__.py", "data/rows.jsonl", "__pycache__/a.pyc"):
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text(name)
    monkeypatch.setattr(fedllm, "__file__", str(package / "__init__.py"))
    beside = Metadata(dict(WHOLE))
    monkeypatch.setattr(metadata, "distribution", lambda _: beside)
    return package


def content(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_text() for path in files}


def test_a_checkout_is_the_app(tmp_path):
    assert app_folder(tmp_path) == ROOT
    assert not any(tmp_path.iterdir())


def test_an_installed_package_becomes_an_app_without_what_python_compiled(
    tmp_path, installed
):
    folder = app_folder(tmp_path / "home")

    assert folder.parent == tmp_path / "home" / "app"
    assert content(folder) == {
        "pyproject.toml": WHOLE["extra_metadata/pyproject.toml"],
        "LICENSE": "the licence",
        "fedllm/__init__.py": "__init__.py",
        "fedllm/data/rows.jsonl": "data/rows.jsonl",
    }
    assert (folder / "fedllm" / "data").stat().st_mode & 0o777 == 0o755


def test_the_folder_is_made_once_and_anew_for_another_content(tmp_path, installed):
    first = app_folder(tmp_path / "home")
    made = (first / "LICENSE").stat().st_ino
    assert app_folder(tmp_path / "home") == first
    assert (first / "LICENSE").stat().st_ino == made

    (installed / "__init__.py").write_text("of 1 length")
    second = app_folder(tmp_path / "home")
    assert second != first
    assert content(second)["fedllm/__init__.py"] == "of 1 length"
    assert content(first)["fedllm/__init__.py"] == "__init__.py"


def test_another_project_s_folder_around_the_package_is_no_checkout(
    tmp_path, installed
):
    others = installed.parent / "pyproject.toml"
    others.write_text('[project]\nname = "others"\n')
    assert app_folder(tmp_path / "home").parent == tmp_path / "home" / "app"
    others.write_text("= no TOML")
    assert app_folder(tmp_path / "home").parent == tmp_path / "home" / "app"


@pytest.mark.parametrize("missing", WHOLE)
def test_a_package_without_its_metadata_is_one_line(
    tmp_path, installed, monkeypatch, missing
):
    kept = {name: text for name, text in WHOLE.items() if name != missing}
    monkeypatch.setattr(metadata, "distribution", lambda _: Metadata(kept))
    with pytest.raises(FedllmError, match=r"site-packages/fedllm.*install fedllm"):
        app_folder(tmp_path / "home")
    assert not (tmp_path / "home").exists()


def test_a_copied_package_that_was_never_installed_is_one_line(
    tmp_path, installed, monkeypatch
):
    def absent(name: str) -> None:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "distribution", absent)
    with pytest.raises(FedllmError, match=r"no pyproject\.toml"):
        app_folder(tmp_path / "home")


def test_a_home_that_cannot_be_written_is_one_line(tmp_path, installed):
    home = tmp_path / "home"
    home.write_text("a file")
    with pytest.raises(FedllmError, match=r"home/app/fedllm-.*FEDLLM_HOME"):
        app_folder(home)


def test_nothing_heavy_is_imported_to_find_the_app():
    code = (
        "import sys, fedllm.deployment.app_folder;"
        "assert not {'torch', 'flwr', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
