"""The lines of a dossier: facts with their source, and what nobody knows."""

import json

import pytest

from fedllm.reporting.dossier import dossier_sections
from fedllm.reporting.facts import NOT_KNOWN
from fedllm.runs.record import read_run
from tests.helpers.dossiers import finished
from tests.helpers.sample_runs import SECRET_COHORTS

NOTHING = {"privacy__unit": "none", "privacy__target_epsilon": 0.0}
SOURCES = ("config.json", "privacy.json", "metrics.jsonl", "result.json", "audit.json")


def lines_of(folder):
    return {
        line.name: line
        for section in dossier_sections(read_run(folder))
        for line in section.lines
    }


def test_the_sections_are_in_the_order_of_the_framework(tmp_path):
    titles = [s.title for s in dossier_sections(read_run(finished(tmp_path / "run")))]

    assert [title.split(".")[0] for title in titles[:7]] == list("1234567")
    assert "28/2024" in titles[7] and "3.3.07" in titles[8]


@pytest.mark.parametrize("changes", [{}, NOTHING, SECRET_COHORTS])
def test_each_line_names_its_source_or_is_not_known(tmp_path, changes):
    for line in lines_of(finished(tmp_path / "run", **changes)).values():
        if line.value.startswith(NOT_KNOWN):
            assert line.source == "", line
        else:
            assert line.source.startswith((*SOURCES, "fedllm", "EDPB")), line


def test_epsilon_is_the_ledgers_and_a_run_without_privacy_has_none(tmp_path):
    private, bare = finished(tmp_path / "a"), finished(tmp_path / "b", **NOTHING)
    content = json.loads((private / "privacy.json").read_text())

    line = lines_of(private)["Epsilon"]
    assert line.source == "privacy.json: epsilon"
    assert float(line.value) == pytest.approx(content["epsilon"], abs=0.01)
    assert lines_of(bare)["Epsilon"].value == "none: nothing is bounded"
    assert lines_of(bare)["Unit"].value == "none"


def test_what_was_not_set_and_what_does_not_apply_is_no_gap(tmp_path):
    folder = finished(tmp_path / "run", data__public_test="", data__name="own")
    lines = lines_of(folder)

    assert lines["Rows declared public, which trained"].value == "none set"
    apart = "Epsilon of a person with rows at two clients"
    assert lines[apart].value == "does not apply"
    assert lines["Released"].value == "peft_best"
    content = json.loads((folder / "privacy.json").read_text())
    del content["epsilon_two_clients"]
    (folder / "privacy.json").write_text(json.dumps(content))
    assert lines_of(folder)[apart].value == NOT_KNOWN


def test_nothing_says_that_the_model_is_anonymous_or_the_use_lawful(tmp_path):
    text = " ".join(
        f"{line.name} {line.value}"
        for line in lines_of(finished(tmp_path / "r")).values()
    )

    for claim in ("is anonymous", "is lawful", "complies", "compliant"):
        for place in text.split(claim)[:-1]:
            assert place.endswith(("whether the model ",)), claim
