"""The tests that the EDPB names: numbers of the run's folder, or not known."""

import json

from fedllm.reporting.facts import NOT_KNOWN
from tests.helpers.dossiers import finished
from tests.reporting.test_dossier import lines_of


def test_the_tests_have_the_audits_numbers_if_there_is_one(tmp_path):
    folder = finished(tmp_path / "run")
    names = ["Membership: canaries", "Membership: certified lower bound of epsilon"]
    before = lines_of(folder)
    assert [before[name].value for name in names] == [NOT_KNOWN] * 2
    assert before["Audit of this run's settings"].value == NOT_KNOWN
    found = {
        "accounted": 8.0,
        "certified": {"epsilon": 1.25, "num_guesses": 100, "num_correct": 75},
        "estimate": {"epsilon": 7.5, "low": 7.0, "high": 8.0},
    }
    audit = {"passed": False, "checks": [], "rehearsal": found, "meaning": "m"}
    (folder / "audit.json").write_text(json.dumps(audit))

    after = lines_of(folder)
    assert after[names[0]].value == "75 of 100 guesses right"
    assert after[names[1]].value.startswith("1.25")
    assert after["Audit of this run's settings"].value == "FAILED"


def test_what_was_not_tried_and_what_others_decide_is_said(tmp_path):
    lines = lines_of(finished(tmp_path / "run"))

    for name in ("Attribute inference", "Model inversion", "Reconstruction"):
        assert lines[f"{name} (fedllm has no such test)"].value == NOT_KNOWN
    decided = [line for name, line in lines.items() if "insignificant" in name]
    assert "the controller decides" in decided[0].value


MEMORISED = {
    "num_planted": 8,
    "most": 4.0,
    "models": {
        name: {
            "exposure": exposure,
            "exposure_low": exposure - 0.5,
            "exposure_high": exposure + 0.5,
            "recited": recited,
            "recited_low": 0.0,
            "recited_high": 0.37,
        }
        for name, exposure, recited in (("base", 1.0, 0), ("private", 1.25, 1))
    },
}


def test_extraction_has_the_numbers_of_each_model(tmp_path):
    folder = finished(tmp_path / "run")
    names = "Extraction: exposure of planted sentences"
    assert lines_of(folder)[names].value == NOT_KNOWN
    (folder / "memorised.json").write_text(json.dumps(MEMORISED))
    lines = lines_of(folder)

    exposure = lines["Extraction: exposure, private"]
    assert exposure.value == "1.25 bits (0.75 to 1.75) of at most 4.00"
    assert exposure.source == "memorised.json: models.private.exposure"
    assert lines["Extraction: recited word by word, private"].value.startswith("1 of 8")
