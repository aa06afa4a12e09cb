"""The drawing of the import graph."""

import importlib.util
from types import ModuleType
from xml.etree import ElementTree

import pytest

from tests.helpers.rows import ROOT

LAYERS = [["apps", "commands"], ["server"], ["errors"]]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    pytest.importorskip("grimp")
    path = ROOT / "tools" / "draw_imports.py"
    spec = importlib.util.spec_from_file_location("draw_imports", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_import_of_the_package_points_down(script, tmp_path, capsys):
    assert script.main(["--out", str(tmp_path / "imports.svg")]) == 0

    drawing = ElementTree.parse(tmp_path / "imports.svg").getroot()
    names = {text.text for text in drawing.iter("{http://www.w3.org/2000/svg}text")}
    assert names == {
        path.stem
        for path in (ROOT / "fedllm").iterdir()
        if path.suffix == ".py" or (path / "__init__.py").exists()
    } - {"__init__"}
    assert "arrows" in capsys.readouterr().out


@pytest.mark.parametrize("arrow", [("errors", "server"), ("apps", "commands")])
def test_an_arrow_that_goes_up_or_stays_in_its_row_fails_and_is_red(
    script, tmp_path, monkeypatch, capsys, arrow
):
    monkeypatch.setattr(script, "read_layers", lambda path: LAYERS)
    monkeypatch.setattr(
        script, "find_arrows", lambda layers: [("apps", "server"), arrow]
    )
    out = tmp_path / "imports.svg"

    assert script.main(["--out", str(out)]) == 1
    assert f"{arrow[0]} imports {arrow[1]}" in capsys.readouterr().err
    assert out.read_text().count("#c00") == 1


def test_a_package_that_stands_in_no_layer_is_named(script):
    with pytest.raises(ValueError, match=r"no layer of pyproject.toml: .*wire"):
        script.find_arrows([["config"], ["errors"]])
