"""The released rounds of a run, outside of its folder."""

import json
import stat
from concurrent.futures import ThreadPoolExecutor

import pytest

from fedllm.errors import PrivacyError
from fedllm.privacy.released_rounds import ReleasedRounds


@pytest.fixture
def released(tmp_path):
    rounds = ReleasedRounds(tmp_path, "2026-01-01_00-00-00_7")
    rounds.begin()
    return rounds


def test_rounds_are_kept_in_order_for_every_copy_and_for_the_owner_alone(
    released, tmp_path
):
    released.add(1, [])
    released.add(2, [1])

    other = ReleasedRounds(tmp_path, "2026-01-01_00-00-00_7")
    assert other.read() == [1, 2]
    assert stat.S_IMODE(released.path.stat().st_mode) == 0o600
    assert stat.S_IMODE(released.path.parent.stat().st_mode) == 0o700


def test_a_round_is_given_once(released):
    released.add(1, [])

    with pytest.raises(PrivacyError, match="another copy .* has released round 1:"):
        released.add(1, [])
    with pytest.raises(PrivacyError, match="another copy .* has released round 1:"):
        released.add(2, [])
    assert released.read() == [1]


def test_of_processes_that_release_at_once_one_does(released, tmp_path):
    def release(_: int) -> bool:
        try:
            ReleasedRounds(tmp_path, "2026-01-01_00-00-00_7").add(1, [])
        except PrivacyError:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(release, range(8))) == 1


def test_what_only_the_ledger_knows_is_never_lost(released):
    # A crash between the ledger and this file.
    released.add(3, [1, 2])

    assert released.read() == [1, 2, 3]


@pytest.mark.parametrize(
    "content",
    ["", "{}", "[]", '{"rounds": 3}', '{"rounds": [2, 1]}', '{"rounds": [0]}'],
)
def test_a_damaged_file_is_one_line(released, content):
    released.path.write_text(content)

    with pytest.raises(PrivacyError, match=r"cannot be read \(.*start a new run"):
        released.read()
    with pytest.raises(PrivacyError, match="cannot be read"):
        released.add(1, [])


def test_a_missing_file_is_an_error_and_is_never_made_again(released):
    released.path.unlink()

    with pytest.raises(PrivacyError, match="is missing.*set FEDLLM_HOME"):
        released.add(1, [])
    assert not released.path.exists()


def test_a_run_does_not_begin_twice(released, tmp_path):
    with pytest.raises(PrivacyError, match="earlier run"):
        released.begin()
    assert json.loads(released.path.read_text()) == {"rounds": []}


@pytest.mark.parametrize("name", ["", "../x", "a/b", ".", "..", "\x1b[2J", "x" * 201])
def test_a_name_that_is_no_run_s_is_rejected(tmp_path, name):
    with pytest.raises(PrivacyError, match="names the run"):
        ReleasedRounds(tmp_path, name)
