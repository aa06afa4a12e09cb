"""report.html: valid, alone, honest, and silent about what is secret."""

import json

import pytest

from fedllm.runs.state import RunState
from tests.helpers.pages import check
from tests.helpers.sample_runs import HOSTILE, SECRET_COHORTS, write_run

NO_PRIVACY = {"privacy__unit": "none", "privacy__target_epsilon": 0.0}


def test_the_page_is_valid_needs_no_network_and_names_what_was_trained(tmp_path):
    folder = write_run(tmp_path / "run")
    page, text = check(folder)

    privacy = json.loads((folder / "privacy.json").read_text())
    assert privacy["statement"] in text
    assert all(line in text for line in privacy["not_covered"])
    assert "4 clients" in text and "3 of 3 rounds" in text
    assert "3.750" in text and "2.960" in text
    assert text.count(HOSTILE) == 4
    assert "not medical advice" in text
    assert page.count("<svg") == 5
    assert "http-equiv" not in page
    assert "R is" in text


def test_html5lib_finds_no_error_either(tmp_path):
    html5lib = pytest.importorskip("html5lib")
    page, _ = check(write_run(tmp_path / "run"))

    html5lib.HTMLParser(strict=True).parse(page)


def test_the_same_run_gives_the_same_page(tmp_path):
    folder = write_run(tmp_path / "run")

    assert check(folder)[0] == check(folder)[0]


def test_secret_cohorts_stay_secret(tmp_path):
    folder = write_run(tmp_path / "run", **SECRET_COHORTS)
    page, text = check(folder)

    # Of traffic, of time, of the plots that are not there, and below the table.
    assert text.count("not shown, because cohorts are secret") == 4
    for name in ("clients", "traffic", "seconds"):
        assert f'id="{name}-' not in page
    assert "Right at most, by this run's noise" not in text
    assert 'id="loss-' in page and 'id="epsilon-' in page


def test_a_running_page_reloads_itself_and_has_what_is_spent_so_far(tmp_path):
    folder = write_run(tmp_path / "run", rounds=1, finished=False)
    state = RunState(folder)
    page, text = check(folder)

    assert 'http-equiv="refresh"' in page
    assert "1 of 3 rounds" in text and "so far" in text
    assert not (folder / "README.md").exists()
    state.finish()
    assert "refresh" not in check(folder)[0]
