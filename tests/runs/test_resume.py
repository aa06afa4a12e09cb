"""Which runs can be resumed, and with which settings."""

import pytest

from fedllm.errors import ConfigError, FederationError
from tests.helpers.federations import (
    NO_PRIVACY,
    cut_in_round,
    edit,
    federation,
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
