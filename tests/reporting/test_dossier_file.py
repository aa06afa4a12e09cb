"""The dossier's files: what it takes, and what it is not written of."""

import json

import pytest

from fedllm.errors import FedllmError, PrivacyError
from fedllm.reporting.dossier_file import signed_text, write_dossier
from fedllm.signatures import DOSSIER_LABEL, is_signed, server_key
from tests.helpers.dossiers import finished
from tests.helpers.pages import Checker


@pytest.fixture
def key(tmp_path):
    return server_key(tmp_path / "home")


def test_the_page_is_whole_and_fetches_nothing_and_its_facts_are_signed(tmp_path, key):
    page, path = write_dossier(finished(tmp_path / "run"), key)
    content = json.loads(path.read_text())
    checker = Checker()
    checker.feed(page.read_text())

    assert checker.wrong == [] and checker.open == []
    assert checker.links <= {"data:,"}
    assert "<script" not in page.read_text()
    text = signed_text(content["signed"])
    assert is_signed(DOSSIER_LABEL, text, content["signature"], key.public_key())
    assert set(content["signed"]["files"]) == {
        *("config.json", "privacy.json", "metrics.jsonl", "result.json")
    }


@pytest.mark.parametrize("rounds", [0, 2])
def test_a_run_that_did_not_finish_has_no_dossier(tmp_path, key, rounds):
    folder = finished(tmp_path / "run", rounds=rounds, finished=False)

    with pytest.raises(FedllmError, match="the run is interrupted") as caught:
        write_dossier(folder, key)
    assert "\n" not in str(caught.value)
    assert not (folder / "dossier.html").exists()


def test_an_edited_ledger_has_no_dossier(tmp_path, key):
    folder = finished(tmp_path / "run")
    content = json.loads((folder / "privacy.json").read_text())
    del content["chain"][0]
    (folder / "privacy.json").write_text(json.dumps(content))

    with pytest.raises(PrivacyError, match="the ledger was edited: chain") as caught:
        write_dossier(folder, key)
    assert "\n" not in str(caught.value)


def test_a_ledger_that_forgets_a_round_of_the_run_has_no_dossier(tmp_path, key):
    folder, shorter = finished(tmp_path / "run"), finished(tmp_path / "less", rounds=2)
    (folder / "privacy.json").write_text((shorter / "privacy.json").read_text())

    with pytest.raises(PrivacyError, match="it lacks round 3, which metrics.jsonl"):
        write_dossier(folder, key)


def test_a_folder_without_what_the_lines_need_is_one_line(tmp_path, key):
    folder = finished(
        tmp_path / "run", **{"privacy__unit": "none", "privacy__target_epsilon": 0.0}
    )
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "versions": 7}))

    with pytest.raises(FedllmError, match="is damaged"):
        write_dossier(folder, key)
