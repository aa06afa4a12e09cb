"""A folder that shows whether its ledger is the one that was written."""

import json
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from fedllm.errors import PrivacyError
from fedllm.privacy import sealed_folder
from fedllm.privacy.sealed_folder import SealedFolder

EMPTY = {"format": 3, "entries": []}

ADDING = """
import sys
from pathlib import Path
from fedllm.privacy.sealed_folder import SealedFolder
folder = SealedFolder(Path(sys.argv[1]), {"format": 3, "entries": []})
print("ready", flush=True)
sys.stdin.readline()
for number in range(15):
    with folder.locked() as content:
        content["entries"].append([sys.argv[2], number])
        folder.write(content)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "ledgers/node"


def entries(folder: Path) -> list:
    with SealedFolder(folder, EMPTY).locked() as content:
        return list(content["entries"])


def add(folder: Path, entry: str) -> None:
    sealed = SealedFolder(folder, EMPTY)
    with sealed.locked() as content:
        content["entries"].append(entry)
        sealed.write(content)


def test_what_was_written_is_there_after_a_restart_for_its_owner_alone(folder):
    add(folder, "one")
    add(folder, "two")

    assert entries(folder) == ["one", "two"]
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    modes = {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()}
    assert modes == {0o600}


def test_of_two_processes_none_writes_over_the_other(folder):
    SealedFolder(folder, EMPTY)
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", ADDING, str(folder), name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for name in "ab"
    ]
    for writer in writers:
        assert writer.stdout.readline() == "ready\n"
    for writer in writers:
        writer.stdin.write("\n")
        writer.stdin.flush()
    for writer in writers:
        writer.communicate(timeout=30)
        assert writer.returncode == 0

    assert sorted(entries(folder)) == [[name, i] for name in "ab" for i in range(15)]


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: (folder / "ledger.json").unlink(),
        lambda folder: (folder / "ledger.json").write_text(""),
        lambda folder: (folder / "ledger.json").write_text("[]"),
        lambda folder: (folder / "key").unlink(),
        lambda folder: (folder / "key").write_bytes(b"0" * 32),
        lambda folder: edit(folder, lambda outer: outer["content"]["entries"].pop()),
        lambda folder: edit(folder, lambda outer: outer.update(seal=None)),
    ],
)
def test_what_is_edited_lost_or_cut_short_is_an_error(folder, change):
    add(folder, "one")
    change(folder)

    with pytest.raises(PrivacyError, match="the ledger cannot be trusted"):
        entries(folder)


def edit(folder: Path, change) -> None:
    path = folder / "ledger.json"
    outer = json.loads(path.read_text())
    change(outer)
    path.write_text(json.dumps(outer))


def test_a_ledger_of_another_folder_is_an_error(folder, tmp_path):
    add(folder, "one")
    add(tmp_path / "other", "two")
    shutil.copy(tmp_path / "other/ledger.json", folder / "ledger.json")

    with pytest.raises(PrivacyError, match="belongs to other data"):
        entries(folder)


def test_a_format_that_this_version_does_not_know_is_an_error(folder):
    add(folder, "one")

    with (
        pytest.raises(PrivacyError, match="cannot be trusted"),
        SealedFolder(folder, {**EMPTY, "format": 4}).locked(),
    ):
        pass


def test_a_full_disk_leaves_the_old_content(folder, monkeypatch):
    add(folder, "one")

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sealed_folder, "write_atomic", full)
    with pytest.raises(PrivacyError, match="No space left.*nothing is released"):
        add(folder, "two")

    assert entries(folder) == ["one"]


def test_a_folder_that_cannot_be_made_is_an_error(tmp_path):
    (tmp_path / "ledgers").write_text("in the way")

    with pytest.raises(PrivacyError, match="without it nothing may be released"):
        SealedFolder(tmp_path / "ledgers/node", EMPTY)
