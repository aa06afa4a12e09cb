"""What a SuperLink's database holds after a wipe."""

import shutil
import sqlite3

import pytest

from fedllm.deployment.superlink import wipe_database
from fedllm.errors import FederationError

UPDATE = bytes(range(1, 251)) * 200


@pytest.fixture
def database(tmp_path):
    """A database with a deleted update, as a process that was killed leaves it."""
    opened = sqlite3.connect(tmp_path / "open.db", isolation_level=None)
    opened.execute("PRAGMA journal_mode = WAL")
    opened.execute("CREATE TABLE objects (content BLOB)")
    opened.execute("INSERT INTO objects VALUES (?), (?)", (UPDATE, b"kept"))
    # In the file itself, and then once more in the log.
    opened.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    opened.execute("INSERT INTO objects VALUES (?)", (UPDATE,))
    opened.execute("DELETE FROM objects WHERE content = ?", (UPDATE,))
    (tmp_path / "ended").mkdir()
    for name in ("", "-wal", "-shm"):
        ended = tmp_path / "ended" / f"superlink.db{name}"
        shutil.copy(tmp_path / f"open.db{name}", ended)
    opened.close()
    return tmp_path / "ended" / "superlink.db"


def test_a_wipe_leaves_no_byte_of_a_deleted_update_and_every_other_row(database):
    files = {path.name: path.read_bytes() for path in database.parent.iterdir()}
    assert UPDATE[:250] in files["superlink.db-wal"]
    assert UPDATE[:250] in files["superlink.db"]

    wipe_database(database)

    assert list(database.parent.iterdir()) == [database]
    assert UPDATE[:250] not in database.read_bytes()
    opened = sqlite3.connect(database)
    assert opened.execute("SELECT content FROM objects").fetchall() == [(b"kept",)]
    opened.close()


def test_a_database_that_is_open_or_missing_is_an_error_and_none_is_made(database):
    opened = sqlite3.connect(database)
    opened.execute("SELECT * FROM objects").fetchall()
    with pytest.raises(FederationError, match="has ended"):
        wipe_database(database)
    opened.close()

    missing = database.with_name("none.db")
    with pytest.raises(FederationError, match="cannot be wiped"):
        wipe_database(missing)
    assert not missing.exists()
