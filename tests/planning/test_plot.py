"""The plan's plot."""

from tests.helpers.plans import ONE_STEP, plan_text


def test_a_plot_is_written_and_its_path_printed(capsys, tmp_path):
    file = tmp_path / "plan.svg"

    text = plan_text(capsys, *ONE_STEP, "--plot", str(file))

    assert f"plot: {file}" in text
    drawn = file.read_text()
    assert "epsilon 8" in drawn
    assert "this run" in drawn


def test_a_run_that_was_not_measured_is_not_drawn(capsys, tmp_path):
    file = tmp_path / "plan.svg"

    plan_text(capsys, "--plot", str(file), "--rounds", "3")

    drawn = file.read_text()
    assert "epsilon 8" in drawn
    assert "this run" not in drawn
