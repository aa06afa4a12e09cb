"""report.html and dossier.html in a headless Chromium: no complaint, nothing cut off, readable in the dark.

FEDLLM_CHROMIUM names the program where it is not on the path. FEDLLM_SCREENSHOTS names a
folder that is to hold pictures for a person to look at.
"""

import os
from pathlib import Path

import pytest

from fedllm.reporting.dossier_file import write_dossier
from fedllm.reporting.report import write_report
from fedllm.runs.state import RunState
from fedllm.signatures import server_key
from tests.helpers.sample_runs import SECRET_COHORTS, write_run

pytestmark = pytest.mark.browser
NAMES = [
    *("finished", "secret", "none", "many", "failed"),
    *("finished-dossier", "none-dossier"),
]
_SIZES = {"phone": (390, 844), "desk": (1280, 900)}
# Contrast that WCAG 2 asks of large text and of drawings.
_LEAST_CONTRAST = 3.0


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    home = tmp_path_factory.mktemp("runs")
    nothing = {"privacy__unit": "none", "privacy__target_epsilon": 0.0}
    found = {
        "finished": write_run(home / "finished"),
        "secret": write_run(home / "secret", **SECRET_COHORTS),
        "none": write_run(home / "none", **nothing),
        "many": write_run(home / "many", rounds=60, num_server_rounds=60),
        "failed": home / "failed",
    }
    found["failed"].mkdir()
    RunState(found["failed"]).fail("FederationError: nobody came")
    for folder in found.values():
        write_report(folder)
    pages = {name: folder / "report.html" for name, folder in found.items()}
    key = server_key(home / "server")
    for name in ("finished", "none"):
        pages[f"{name}-dossier"], _ = write_dossier(found[name], key)
    return pages


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", _SIZES)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_shows_without_complaint(browser, folders, name, size, scheme):
    width, height = _SIZES[size]
    context = browser.new_context(
        viewport={"width": width, "height": height}, color_scheme=scheme, offline=True
    )
    page, messages = context.new_page(), []
    page.on("console", lambda message: messages.append(message.text))
    page.on("pageerror", lambda error: messages.append(str(error)))
    asked = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(folders[name].as_uri())
    if pictures := os.environ.get("FEDLLM_SCREENSHOTS"):
        path = Path(pictures) / f"{name}-{size}-{scheme}.png"
        page.screenshot(path=str(path), full_page=True)

    assert messages == []
    assert [url for url in asked if not url.startswith(("file:", "data:"))] == []
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate(_CUT_TEXT) == []
    for colour, ground in page.evaluate(_COLOURS):
        assert contrast(colour, ground) >= _LEAST_CONTRAST, (colour, ground)
    context.close()


_CUT_TEXT = """
[...document.querySelectorAll('svg')].flatMap(svg => {
  const box = svg.getBoundingClientRect();
  return [...svg.querySelectorAll('text')].filter(text => {
    const own = text.getBoundingClientRect();
    return own.left < box.left - 1 || own.right > box.right + 1
        || own.top < box.top - 1 || own.bottom > box.bottom + 1;
  }).map(text => text.textContent);
})
"""
# Pairs of colours: what is drawn, and what it stands on. Rules and grids may be faint.
_COLOURS = """
(() => {
  const probe = document.createElement('i');
  probe.style.color = 'var(--rule)';
  document.body.append(probe);
  const faint = getComputedStyle(probe).color;
  probe.remove();
  const ground = getComputedStyle(document.body).backgroundColor;
  const pairs = [];
  for (const part of document.querySelectorAll('p, td, th, li, dd, dt, figcaption'))
    if (!part.closest('figure, .tiles')) pairs.push([getComputedStyle(part).color, ground]);
  for (const part of document.querySelectorAll('svg path, svg use, svg text')) {
    const card = getComputedStyle(part.closest('figure')).backgroundColor;
    const style = getComputedStyle(part);
    for (const key of ['fill', 'stroke'])
      // A colour of its own; what is only inherited may draw nothing.
      if (part.style[key] && style[key].startsWith('rgb(') && style[key] !== faint)
        pairs.push([style[key], card]);
  }
  return [...new Set(pairs.map(JSON.stringify))].map(JSON.parse);
})()
"""


def contrast(one: str, other: str) -> float:
    """The contrast ratio of WCAG 2 between two colours, `rgb(r, g, b)`."""

    def luminance(colour: str) -> float:
        values = [int(v) / 255 for v in colour[4:-1].split(",")]
        linear = [
            v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in values
        ]
        return sum(w * v for w, v in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    dark, bright = sorted((luminance(one), luminance(other)))
    return (bright + 0.05) / (dark + 0.05)
