"""report.html: valid, alone, honest, and silent about what is secret."""

import json
import re
from html.parser import HTMLParser

import pytest

from fedllm.privacy.wording import BANDS, percent
from fedllm.reporting.report import write_report
from fedllm.runs.state import RunState
from tests.reporting.sample_runs import HOSTILE, write_run

VOID = {"meta", "link", "br", "path", "use", "rect"}
NO_PRIVACY = {"privacy__unit": "none", "privacy__target_epsilon": 0.0}


class Checker(HTMLParser):
    """Finds what is not closed, ids twice, and anything that would be fetched."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.wrong: list[str] = []
        self.ids: set[str] = set()
        self.links: set[str] = set()
        self.tags: set[str] = set()
        self.text: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        if tag not in VOID:
            self.open.append(tag)
        for key, value in attrs:
            if key == "id":
                if value in self.ids:
                    self.wrong.append(f"id {value} twice")
                self.ids.add(value)
            if key in ("href", "src", "xlink:href", "action"):
                self.links.add(value)
            if "://" in (value or ""):
                self.wrong.append(f"{tag} {key}={value}")

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        if tag in VOID:
            return
        if not self.open or self.open.pop() != tag:
            self.wrong.append(f"</{tag}> out of place")

    def handle_data(self, data):
        if "style" not in self.open:
            self.text.append(data)


def check(folder):
    """Write the page, and return what stands in it."""
    write_report(folder)
    page = (folder / "report.html").read_text()
    checker = Checker()
    checker.feed(page)
    checker.close()
    assert checker.wrong == [] and checker.open == []
    assert not checker.tags & {"script", "iframe", "img", "object", "base"}
    for link in checker.links:
        assert link == "data:," or link[1:] in checker.ids, link
    assert "url(" not in re.sub(r"url\(#[\w-]+\)", "", page)
    assert "@import" not in page
    return page, " ".join(" ".join(checker.text).split())


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


def test_colours_are_the_pages_own(tmp_path):
    page, _ = check(write_run(tmp_path / "run"))

    svg = "".join(re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL))
    assert not re.findall(r"#[0-9a-f]{6}\b", svg)
    assert "var(--s1)" in svg and "currentColor" in svg
    assert "prefers-color-scheme: dark" in page


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
    poisson = {"strategy__sampling": "poisson", "strategy__fraction_train": 0.5}
    folder = write_run(tmp_path / "run", **poisson)
    page, text = check(folder)

    # Of traffic, of time, of the plots that are not there, and below the table.
    assert text.count("not said, since cohorts are secret") == 4
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


def test_a_run_that_failed_before_it_knew_anything_has_a_page_with_the_reason(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    RunState(folder).fail(f"FederationError: {HOSTILE}")
    _, text = check(folder)

    assert "failed" in text and HOSTILE in text


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


def test_many_rounds_are_drawn_as_lines(tmp_path):
    page, _ = check(write_run(tmp_path / "run", rounds=50, num_server_rounds=50))

    assert len(page) < 150_000


@pytest.mark.parametrize("content", ["{", "[1]", '{"run_config": 3}'])
def test_a_damaged_folder_is_one_warning_and_no_error(tmp_path, caplog, content):
    folder = write_run(tmp_path / "run")
    (folder / "config.json").write_text(content)

    write_report(folder)

    assert [r.levelname for r in caplog.records] == ["WARNING"]
    assert "report.html" in caplog.text and "\n" not in caplog.messages[0]


def test_shares_are_rounded_up():
    assert percent(0.99966) == "99.97 %"
    assert percent(0.5) == "50.00 %"
    assert percent(0.9999999) == "100.00 %"
