"""A run with one noise for all records, from the question before round 1 to its account."""

import json

from tests.helpers.federations import (
    JOINT,
    quick,
    settings,
    start,
)

__all__ = ["quick", "settings"]


def test_a_joint_run_trains_and_states_the_epsilon_of_a_row(settings):
    run, grid = start({**settings, **JOINT})

    run.run()

    content = json.loads((run.directory.path / "privacy.json").read_text())
    assert content["declared_rows"] == [8, 8, 8]
    assert content["sampling_probability"] == 6 / 24
    assert content["releases"] == [1, 2]
    assert content["statement"].startswith("Record-level differential privacy")
    assert "is trusted" in content["statement"]
    kinds = [message.metadata.message_type for message in grid.sent]
    assert kinds == ["query"] * 3 + ["train"] * 6
