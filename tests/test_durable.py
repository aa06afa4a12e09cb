"""Files that are there whole or not at all."""

import os

import pytest

from fedllm.atomic_files import write_atomic


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
