"""report.html: valid, alone, honest, and silent about what is secret."""

import json

import pytest

from fedllm.privacy.wording import BANDS
from fedllm.runs.state import RunState
from tests.helpers.pages import check
from tests.helpers.sample_runs import HOSTILE, SECRET_COHORTS, write_run

NO_PRIVACY = {"privacy__unit": "none", "privacy__target_epsilon": 0.0}


def test_the_page_is_valid_needs_no_network_and_says_what_was_trained(tmp_path):
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


def test_epsilon_8_is_not_flattered(tmp_path):
    _, text = check(write_run(tmp_path / "run"))

    # (e^8 - 1 + 2e-5) / (e^8 + 1) is an advantage of 0.99933.
    assert "protection is reasonable" in text
    assert "zero-out 8.00 99.97 %" in text
    assert "replace-one 19.13 100.00 %" in text
    assert "e^8.00 is 2,981" in text


def test_an_unprotected_run_says_so(tmp_path):
    loose = {"privacy__target_epsilon": 0.0, "privacy__noise_multiplier": 0.02}
    _, text = check(write_run(tmp_path / "run", **loose))

    assert f"protection is {BANDS[-1][1]}" in text
    assert "zero-out" in text and "100.00 %" in text


def test_a_run_without_privacy_claims_nothing(tmp_path):
    page, text = check(write_run(tmp_path / "run", **NO_PRIVACY))

    assert "No privacy" in text and "No differential privacy" in text
    assert "ε =" not in text.replace("\xa0", " ") and "Right at most" not in text
    assert 'id="epsilon-' not in page


def test_secret_cohorts_stay_secret(tmp_path):
    folder = write_run(tmp_path / "run", **SECRET_COHORTS)
    page, text = check(folder)

    # Of traffic, of time, of the plots that are not there, and below the table.
    assert text.count("not shown, because cohorts are secret") == 4
    for name in ("clients", "traffic", "seconds"):
        assert f'id="{name}-' not in page
    assert "Right at most, by this run's noise" not in text
    assert 'id="loss-' in page and 'id="epsilon-' in page


def test_a_running_page_reloads_itself_and_says_what_is_spent_so_far(tmp_path):
    folder = write_run(tmp_path / "run", rounds=1, finished=False)
    state = RunState(folder)
    page, text = check(folder)

    assert 'http-equiv="refresh"' in page
    assert "1 of 3 rounds" in text and "so far" in text
    assert not (folder / "README.md").exists()
    state.finish()
    assert "refresh" not in check(folder)[0]


def test_a_record_level_run_has_a_page(tmp_path):
    from fedllm.config import parse_run_config
    from fedllm.planning.record_noise import record_settings
    from fedllm.privacy.record_claims import RecordClaims

    folder = write_run(tmp_path / "run", **NO_PRIVACY)
    config = parse_run_config({"privacy.unit": "record"})
    report = RecordClaims.create(
        folder / "privacy.json", record_settings(config, 4, 1000)
    )
    assert "none to speak of" in check(folder)[1]
    report.note_round(1, {7: 2.0, 8: 3.0})
    _, text = check(folder)

    assert "one record of a client was there" in text
    assert "add-or-remove one record 3.00" in text


def test_an_audit_is_shown(tmp_path):
    folder = write_run(tmp_path / "run")
    audit = {
        "passed": False,
        "checks": [{"name": "noise", "passed": False, "text": HOSTILE}],
        "rehearsal": {
            "accounted": 8.0,
            "certified": {"epsilon": 9.5},
            "estimate": None,
        },
        "meaning": "An audit can convict.",
    }
    (folder / "audit.json").write_text(json.dumps(audit))
    _, text = check(folder)

    assert "Audit: FAILED" in text and "9.50" in text and HOSTILE in text
