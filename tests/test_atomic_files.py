"""Files that are there whole or not at all."""

import os
from pathlib import Path

import pytest

from fedllm.atomic_files import create_once, write_atomic


def test_who_reads_while_a_file_is_replaced_reads_the_old_one_whole(tmp_path):
    path = tmp_path / "ledger.json"
    write_atomic(path, b"old")
    with path.open("rb") as reader:
        write_atomic(path, b"new")

        assert (reader.read(), path.read_bytes()) == (b"old", b"new")
    assert os.listdir(tmp_path) == ["ledger.json"]


def test_what_cannot_be_synced_takes_no_place(tmp_path, monkeypatch):
    path = tmp_path / "ledger.json"
    write_atomic(path, b"old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_atomic(path, b"new")
    assert path.read_bytes() == b"old"


def test_what_others_made_meanwhile_is_taken(tmp_path: Path) -> None:
    folder = tmp_path / "wanted"
    folder.mkdir()

    def make(_: Path) -> None:
        raise AssertionError("it was there")

    assert create_once(folder, make) == folder


def test_others_may_read_what_one_user_made(tmp_path: Path) -> None:
    def make(folder: Path) -> None:
        (folder / "model").touch(mode=0o600)

    folder = create_once(tmp_path / "wanted", make)

    assert folder.stat().st_mode & 0o005 == 0o005
    assert (folder / "model").stat().st_mode & 0o004


def test_what_is_private_is_its_owner_s_alone_whatever_it_was_made_as(tmp_path):
    def make(folder: Path) -> None:
        (folder / "part").mkdir(mode=0o755)
        (folder / "part" / "rows").touch(mode=0o644)

    folder = create_once(tmp_path / "wanted", make, private=True)

    modes = [path.stat().st_mode & 0o777 for path in (folder, *folder.rglob("*"))]
    assert modes == [0o700, 0o700, 0o600]
