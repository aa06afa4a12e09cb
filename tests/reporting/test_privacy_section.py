"""The privacy of a run on its page: honest, complete, and silent about what is secret."""

import json

from fedllm.privacy.wording import BANDS
from tests.helpers.pages import check
from tests.helpers.sample_runs import HOSTILE, write_run

NO_PRIVACY = {"privacy__unit": "none", "privacy__target_epsilon": 0.0}


def test_epsilon_8_is_not_flattered(tmp_path):
    _, text = check(write_run(tmp_path / "run"))

    # (e^8 - 1 + 2e-5) / (e^8 + 1) is an advantage of 0.99933.
    assert "protection is reasonable" in text
    assert "zero-out 8.00 99.97 %" in text
    assert "replace-one 19.13 100.00 %" in text
    assert "e^8.00 is 2,981" in text


def test_an_unprotected_run_is_called_unprotected(tmp_path):
    loose = {"privacy__target_epsilon": 0.0, "privacy__noise_multiplier": 0.02}
    _, text = check(write_run(tmp_path / "run", **loose))

    assert f"protection is {BANDS[-1][1]}" in text
    assert "zero-out" in text and "100.00 %" in text


def test_a_large_delta_is_not_flattered_even_in_an_old_file(tmp_path):
    folder = write_run(tmp_path / "run", privacy__delta=1e-3)
    assert "protection is weak" in check(folder)[1]
    assert "since delta 0.001 is above 1e-05" in check(folder)[1]
    old = json.loads((folder / "privacy.json").read_text())
    old |= {"delta": 0.3, "strength": "reasonable"}
    (folder / "privacy.json").write_text(json.dumps(old))

    assert f"protection is {BANDS[-1][1]}" in check(folder)[1]


def test_a_run_without_privacy_claims_nothing(tmp_path):
    page, text = check(write_run(tmp_path / "run", **NO_PRIVACY))

    assert "No privacy" in text and "No differential privacy" in text
    assert "ε =" not in text.replace("\xa0", " ") and "Right at most" not in text
    assert 'id="epsilon-' not in page


def test_a_record_level_run_has_a_page(tmp_path):
    from fedllm.config_parsing import parse_run_config
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

    by_person = parse_run_config(
        {"privacy.unit": "record", "data.person-column": "who"}
    )
    claims = RecordClaims.create(
        folder / "privacy.json", record_settings(by_person, 4, 1000)
    )
    claims.note_round(1, {7: 2.0, 8: 3.0})
    _, text = check(folder)

    assert "one person of a client was there" in text
    assert "all rows of one person in one client 3.00" in text
    assert "epsilon 6.00 at delta 2e-05 for a person with rows at two clients" in text


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
