"""report.html: valid, alone, honest, and silent about what is secret."""

import json
from html.parser import HTMLParser
from typing import Any

import pytest

from fedllm.reporting.page import page as page_of
from fedllm.runs.record import read_run
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
    assert 'http-equiv="refresh"' not in page
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


class Elements(HTMLParser):
    """Collects each element with the names of its attributes."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: set[tuple[str, ...]] = set()
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.found.add((tag, *(name for name, _ in attrs)))


def leaves(value: Any, path: tuple[Any, ...] = ()):
    """Yield the path of each value that is no list and no object, and of each key."""
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, item in items:
            yield from leaves(item, (*path, key))
    else:
        yield path


def put(value: Any, path: tuple[Any, ...], foreign: Any) -> Any:
    """Return a value with another one at a path."""
    if not path:
        return foreign
    copy = value.copy()
    copy[path[0]] = put(copy[path[0]], path[1:], foreign)
    return copy


def test_no_value_of_a_stranger_s_run_folder_adds_an_element(tmp_path, monkeypatch):
    # Drawings are made of numbers, and take a second each.
    monkeypatch.setattr("fedllm.reporting.page.plots", lambda run: [])
    folder = write_run(tmp_path / "run")
    privacy = json.loads((folder / "privacy.json").read_text())
    privacy["noise_probe"] = {"before": 3.0, "noise_alone": 3.1}
    (folder / "privacy.json").write_text(json.dumps(privacy))
    audit = {"passed": True, "meaning": "m", "checks": [{"name": "n", "text": "t"}]}
    (folder / "audit.json").write_text(json.dumps(audit))
    clean = Elements(page_of(read_run(folder))).found
    hostile = "x\"'><script>alert(1)</script><img src=x onerror=alert(1)>{0}"
    shown = 0

    for path in folder.glob("*.json*"):
        text = path.read_text()
        is_lines = path.suffix == ".jsonl"
        whole = (
            [json.loads(t) for t in text.splitlines()] if is_lines else json.loads(text)
        )
        for place in leaves(whole):
            told = put(whole, place, hostile)
            parts = told if is_lines else [told]
            path.write_text("".join(json.dumps(part) + "\n" for part in parts))
            try:
                page = page_of(read_run(folder))
            except Exception:  # noqa: BLE001 - a damaged folder has no page
                continue
            shown += "&lt;script&gt;" in page
            assert Elements(page).found <= clean, (path.name, place)
        path.write_text(text)

    # Each setting is shown, beside statements, answers and counts.
    assert shown > 80
