"""Which runs can be resumed, and with which settings."""

import shutil

import pytest

from fedllm.errors import ConfigError, FederationError, PrivacyError
from fedllm.privacy.accounting import gaussian_epsilon
from tests.helpers.federations import (
    NO_PRIVACY,
    cut_in_round,
    edit,
    federation,
    read,
    resumed,
)


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        (
            {"privacy.target-epsilon": 4.0},
            "privacy.target-epsilon was 6.0 and is now 4.0",
        ),
        ({"model.name": "other/model"}, "and is now 'other/model'"),
        ({"adapter.kind": "lora"}, "adapter.kind was 'ffa-lora' and is now 'lora'"),
        ({"num-server-rounds": 9}, "num-server-rounds was 3 and is now 9"),
    ],
)
def test_other_settings_than_the_run_s_are_rejected_with_both_values(
    quick, typed, message
):
    given = {**quick, "privacy.target-epsilon": 6.0}
    cut_in_round(given, 2)

    with pytest.raises(ConfigError, match=message):
        federation({"resume.from": "latest", **typed})
    federation({"resume.from": "latest", **given}).run()


@pytest.mark.parametrize("unit", ["client", "record"])
def test_a_run_that_began_with_privacy_never_goes_on_without(quick, unit):
    cut = cut_in_round({**quick, "privacy.unit": unit}, 2)
    edit(cut, "config.json", lambda content: content["run_config"].update(NO_PRIVACY))

    with pytest.raises(ConfigError, match=f"unit was '{unit}' and is now 'none'"):
        resumed()


def test_a_folder_that_cannot_be_resumed_is_rejected(quick, tmp_path):
    with pytest.raises(FederationError, match="latest is not a run folder"):
        resumed()
    with pytest.raises(FederationError, match="is not a run folder"):
        resumed(str(tmp_path))
    with pytest.raises(ConfigError, match="absolute path"):
        resumed("runs/mine")
    federation(quick).run()
    with pytest.raises(FederationError, match=r"is finished: result\.json is there"):
        resumed()


def test_two_runs_never_write_one_folder(quick):
    cut_in_round(quick, 2)
    first = resumed()

    with pytest.raises(FederationError, match="another run is at work"):
        resumed()
    first.run()


def test_latest_follows_the_run_that_goes_on(quick, tmp_path):
    cut = cut_in_round(quick, 2)
    federation(quick).run()
    resumed(str(cut.directory.path)).run()

    assert (tmp_path / "home/runs/latest").resolve() == cut.directory.path.resolve()


def assert_three_rounds_spent(told):
    """Epsilon is that of the planned rounds, each of which was released once."""
    spent = gaussian_epsilon(told["noise_multiplier"], 3, told["delta"])
    assert told["releases"] == [1, 2, 3]
    assert told["epsilon"] == pytest.approx(spent)


def test_a_copied_run_folder_counts_the_rounds_of_its_original(quick, tmp_path, caplog):
    cut = cut_in_round(quick, 2)
    copied = shutil.copytree(cut.directory.path, tmp_path / "copied")
    original = resumed(str(cut.directory.path))
    original.run()
    copy = resumed(str(copied))

    assert "released since then, and counts as spent here too" in caplog.text
    copy.run()
    assert copy.grid.sent == []
    for run in (original, copy):
        assert_three_rounds_spent(read(run, "privacy.json"))


def test_a_run_folder_that_is_put_back_releases_no_round_again(quick, tmp_path):
    cut = cut_in_round(quick, 3)
    place = cut.directory.path
    shutil.copytree(place, tmp_path / "backup")
    resumed(str(place)).run()
    shutil.rmtree(place)
    shutil.copytree(tmp_path / "backup", place)
    again = resumed(str(place))
    again.run()

    assert again.grid.sent == []
    assert_three_rounds_spent(read(again, "privacy.json"))


def test_of_two_copies_at_work_at_once_one_releases_and_the_other_stops(
    quick, tmp_path
):
    cut = cut_in_round(quick, 2)
    copied = shutil.copytree(cut.directory.path, tmp_path / "copied")
    first, second = resumed(str(cut.directory.path)), resumed(str(copied))
    second.run()

    with pytest.raises(PrivacyError, match="another copy of this run's folder"):
        first.run()
    resumed(str(cut.directory.path)).run()
    assert_three_rounds_spent(read(first, "privacy.json"))


def test_a_run_whose_released_rounds_are_not_known_here_is_not_resumed(quick, tmp_path):
    cut = cut_in_round(quick, 2)
    shutil.rmtree(tmp_path / "home" / "released")

    with pytest.raises(PrivacyError, match="is missing, which says how many rounds"):
        resumed(str(cut.directory.path))
