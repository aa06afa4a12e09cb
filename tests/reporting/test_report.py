"""A report of runs that failed or are damaged."""

import pytest

from fedllm.reporting.report import write_report
from fedllm.runs.state import RunState
from tests.helpers.pages import check
from tests.helpers.sample_runs import HOSTILE, write_run


def test_a_run_that_failed_before_it_knew_anything_has_a_page_with_the_reason(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    RunState(folder).fail(f"FederationError: {HOSTILE}")
    _, text = check(folder)

    assert "failed" in text and HOSTILE in text


@pytest.mark.parametrize("content", ["{", "[1]", '{"run_config": 3}'])
def test_a_damaged_folder_is_one_warning_and_no_error(tmp_path, caplog, content):
    folder = write_run(tmp_path / "run")
    (folder / "config.json").write_text(content)

    write_report(folder)

    assert [r.levelname for r in caplog.records] == ["WARNING"]
    assert "report.html" in caplog.text and "\n" not in caplog.messages[0]
