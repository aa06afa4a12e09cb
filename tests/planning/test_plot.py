"""The plan's plot."""

from tests.helpers.plans import told


def test_a_plot_is_written_and_its_path_said(capsys, tmp_path):
    file = tmp_path / "plan.svg"

    text = told(capsys, "--plot", str(file))

    assert f"plot: {file}" in text
    assert "epsilon 8" in file.read_text()
