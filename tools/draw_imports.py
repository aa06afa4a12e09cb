"""Draw which packages and root files of fedllm import which: layers as rows, arrows down.

    python tools/draw_imports.py --out imports.svg

The layers are those that pyproject.toml gives import-linter. The exit status is 1 if an
arrow goes up or stays in its row, and each such arrow is then printed.
"""

import argparse
import sys
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path

import grimp

ROOT = Path(__file__).parent.parent
PACKAGE = "fedllm"

Arrow = tuple[str, str]
"""Who imports, and what."""

_ROW, _COLUMN, _BOX, _HALF, _MARGIN = 96, 150, 124, 15, 20


def read_layers(pyproject: Path) -> list[list[str]]:
    """Return the names in each layer, the highest first."""
    tools = tomllib.loads(pyproject.read_text("utf-8"))["tool"]
    contracts = tools["importlinter"]["contracts"]
    (layers,) = [c["layers"] for c in contracts if c["type"] == "layers"]
    return [[name.strip() for name in row.split("|")] for row in layers]


def find_arrows(layers: Sequence[Sequence[str]]) -> list[Arrow]:
    """Return the imports between the packages and root files in the layers.

    Raises:
        ValueError: A package or a root file stands in no layer.
    """
    graph = grimp.build_graph(PACKAGE)
    nodes = {name.removeprefix(f"{PACKAGE}.") for name in graph.find_children(PACKAGE)}
    if missing := nodes - {name for row in layers for name in row}:
        raise ValueError(f"in no layer of pyproject.toml: {', '.join(sorted(missing))}")
    arrows = set()
    for module in graph.modules:
        importer = _node(module)
        for imported in graph.find_modules_directly_imported_by(module):
            arrows.add((importer, _node(imported)))
    return sorted((a, b) for a, b in arrows if a != b and a and b)


def _node(module: str) -> str:
    """Return the package or root file that a module lies in; "" for fedllm itself."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else ""


def arrows_that_rise(
    layers: Sequence[Sequence[str]], arrows: Iterable[Arrow]
) -> list[Arrow]:
    """Return the arrows that do not lead to a lower row."""
    row = {name: index for index, names in enumerate(layers) for name in names}
    return [(a, b) for a, b in arrows if row[a] >= row[b]]


def draw(layers: Sequence[Sequence[str]], arrows: Sequence[Arrow]) -> str:
    """Return an SVG: a row a layer, and an arrow an import."""
    width = 2 * _MARGIN + max(map(len, layers)) * _COLUMN
    height = 2 * _MARGIN + (len(layers) - 1) * _ROW + 2 * _HALF
    places = _places(layers, width)
    rising = set(arrows_that_rise(layers, arrows))
    lines = [_line(places, arrow, arrow in rising) for arrow in arrows]
    boxes = [_box(name, *place) for name, place in places.items()]
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
            f'width="{width}" height="{height}" font-family="sans-serif" '
            'font-size="13" text-anchor="middle">',
            f"<title>{PACKAGE}: {len(places)} packages and root files, "
            f"{len(arrows)} imports</title>",
            '<defs><marker id="head" viewBox="0 0 8 8" refX="8" refY="4" '
            'markerWidth="7" markerHeight="7" orient="auto">'
            '<path d="M0 0L8 4L0 8z" fill="#777"/></marker></defs>',
            f'<rect width="{width}" height="{height}" fill="white"/>',
            *lines,
            *boxes,
            "</svg>\n",
        ]
    )


def _places(
    layers: Sequence[Sequence[str]], width: int
) -> dict[str, tuple[float, float]]:
    """Return each box's centre; every other row is shifted by a quarter of a column.

    Without the shift an arrow over several rows would hide behind the boxes between.
    """
    places = {}
    for index, names in enumerate(layers):
        left = (width - len(names) * _COLUMN) / 2 + (index % 2 - 0.5) * _COLUMN / 4
        for column, name in enumerate(names):
            x = left + (column + 0.5) * _COLUMN
            places[name] = (x, float(_MARGIN + _HALF + index * _ROW))
    return places


def _line(places: Mapping[str, tuple[float, float]], arrow: Arrow, rises: bool) -> str:
    (x1, y1), (x2, y2) = places[arrow[0]], places[arrow[1]]
    side = -_HALF if rises else _HALF
    colour, thick = ("#c00", 2.5) if rises else ("#777", 0.8)
    return (
        f'<path d="M{x1:.0f} {y1 + side:.0f}C{x1:.0f} {y1 + 3 * side:.0f} '
        f'{x2:.0f} {y2 - 4 * side:.0f} {x2:.0f} {y2 - side:.0f}" fill="none" '
        f'stroke="{colour}" stroke-width="{thick}" marker-end="url(#head)">'
        f"<title>{escape(arrow[0])} imports {escape(arrow[1])}</title></path>"
    )


def _box(name: str, x: float, y: float) -> str:
    return (
        f'<rect x="{x - _BOX / 2:.0f}" y="{y - _HALF:.0f}" width="{_BOX}" '
        f'height="{2 * _HALF}" rx="5" fill="#eef3fa" stroke="#456"/>'
        f'<text x="{x:.0f}" y="{y + 5:.0f}">{escape(name)}</text>'
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the drawing, and return 1 if an arrow rises."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("imports.svg"))
    out: Path = parser.parse_args(arguments).out
    layers = read_layers(ROOT / "pyproject.toml")
    arrows = find_arrows(layers)
    out.write_text(draw(layers, arrows), "utf-8")
    rising = arrows_that_rise(layers, arrows)
    nodes = sum(map(len, layers))
    print(f"{out}: {nodes} nodes in {len(layers)} rows, {len(arrows)} arrows")
    for importer, imported in rising:
        print(f"{importer} imports {imported}, which is no lower", file=sys.stderr)
    return 1 if rising else 0


if __name__ == "__main__":
    sys.exit(main())
