"""What others install, publish and cite: wheel, sdist, Flower's bundle, the tested set."""

import ast
import hashlib
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from collections.abc import Iterator
from importlib import metadata
from io import BytesIO
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
NOT_SOURCE = (".git", ".venv", ".mypy_cache", ".hypothesis", "dist", "site", "*.fab")
MIB = 2**20
# What Flower's Hub takes, by its own words, beside LICENSE and .gitignore at the root.
HUB_ENDINGS = {".py", ".toml", ".md", ".yaml", ".yml", ".json", ".jsonl"}
# Tests that want one of these skip themselves where the extra is absent.
OPTIONAL = {"gradio", "mlflow", "openpyxl", "playwright", "tensorboard", "wandb"}
BUNDLE = """
import hashlib, sys
from pathlib import Path
from fedllm.deployment.app_folder import app_folder
from flwr.cli.build import build_fab_from_disk
folder = app_folder(Path(sys.argv[1]))
print(folder)
print(hashlib.sha256(build_fab_from_disk(folder)).hexdigest())
"""

# Flower reads patterns by an old name of pathspec's.
pytestmark = pytest.mark.filterwarnings("ignore:GitWildMatch:DeprecationWarning")


@pytest.fixture(scope="module")
def app(tmp_path_factory):
    """The project's files, as a publisher or a build has them."""
    folder = tmp_path_factory.mktemp("checkout") / "fedllm"
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(*NOT_SOURCE))
    return folder


@pytest.fixture(scope="module")
def built(app, tmp_path_factory):
    """A wheel and an sdist."""
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, app)
    (wheel,), (sdist,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    return wheel, sdist


@pytest.fixture(scope="module")
def bundle(app):
    """The bundle that `flwr run` sends to every client."""
    from flwr.cli.build import build_fab_from_disk

    return build_fab_from_disk(app)


def run(*command: object, cwd: Path = ROOT) -> str:
    done = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def package_data(folder: Path) -> set[str]:
    """Return the paths of what the package reads beside its code."""
    found = {
        path.relative_to(folder).as_posix()
        for ending in HUB_ENDINGS - {".py"}
        for path in (folder / "fedllm").rglob(f"*{ending}")
    }
    assert "fedllm/planning/frontier.json" in found
    return found


def test_a_package_index_takes_wheel_and_sdist(built):
    said = run(sys.executable, "-m", "twine", "--no-color", "check", "--strict", *built)
    assert said.count("PASSED") == 2


def test_the_wheel_holds_the_package_with_data_and_types_and_the_app_s_settings(
    app, built
):
    with zipfile.ZipFile(built[0]) as wheel:
        names = set(wheel.namelist())
        (settings,) = (n for n in names if n.endswith("extra_metadata/pyproject.toml"))
        assert wheel.read(settings) == (ROOT / "pyproject.toml").read_bytes()
    assert package_data(app) | {"fedllm/py.typed"} <= names
    assert {name.split("/")[0] for name in names} == {"fedllm", settings.split("/")[0]}


def test_the_sdist_holds_what_its_tests_read(built):
    with tarfile.open(built[1]) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    assert {"pyproject.toml", "LICENSE", "README.md", "CITATION.cff"} <= names
    assert {"tests/test_package.py", "deploy/constraints.txt"} <= names


def test_an_installed_wheel_is_the_same_app_as_the_checkout(built, bundle, tmp_path):
    environment, empty = tmp_path / "venv", tmp_path / "empty"
    empty.mkdir()
    run(sys.executable, "-m", "venv", "--without-pip", environment)
    python = environment / "bin" / "python"
    pip = (sys.executable, "-m", "pip", "--quiet", "--python", python)
    run(*pip, "install", "--no-deps", "--no-index", built[0])
    (own,) = environment.glob("lib/python*/site-packages")
    # Its dependencies; what an editable installation adds to the path stays behind.
    borrowed = sysconfig.get_paths()["purelib"]
    (own / "borrowed.pth").write_text(f"{borrowed}\n")

    said = run(python, "-I", "-c", BUNDLE, tmp_path / "home", cwd=empty)

    folder, digest = said.splitlines()
    assert Path(folder).parent == tmp_path / "home" / "app"
    assert digest == hashlib.sha256(bundle).hexdigest()
    assert not any(empty.iterdir())


def test_the_bundle_holds_the_package_with_its_data_and_nothing_else(app, bundle):
    with zipfile.ZipFile(BytesIO(bundle)) as fab:
        names = set(fab.namelist())
    beside = {"pyproject.toml", "LICENSE", ".info/CONTENT"}
    assert package_data(app) | beside <= names
    assert all(name.startswith("fedllm/") for name in names - beside)


def test_what_is_published_stays_within_the_limits_of_flower_s_hub(app):
    from flwr.cli.utils import collect_files, filter_paths_for_publish

    published = filter_paths_for_publish(collect_files(app))

    assert {"README.md", "LICENSE", "pyproject.toml"} <= set(published)
    assert len(published) <= 1000
    sizes = {name: path.stat().st_size for name, path in published.items()}
    assert [name for name, size in sizes.items() if size > MIB] == []
    assert sum(sizes.values()) <= 10 * MIB
    for name, path in published.items():
        assert path.suffix in HUB_ENDINGS or name in ("LICENSE", ".gitignore"), name
        assert len(Path(name).parts) <= 10, name
        path.read_text("utf-8")
    assert 0 < len(PROJECT["project"]["description"]) <= 200


def test_the_bundle_has_the_hub_s_format_and_runs_where_our_ranges_allow():
    told = PROJECT["tool"]["flwr"]["app"]
    (flower,) = (r for r in requirements("dependencies") if r.name == "flwr")
    assert told["fab-format-version"] == 1
    assert PROJECT["project"]["license"] == {"file": "LICENSE"}
    assert ">=" in {part.operator for part in flower.specifier}
    assert told["flwr-version-target"] == pinned_set()["flwr"]


def requirements(key: str) -> list[Requirement]:
    lines = PROJECT["project"].get(key) or PROJECT["project"][
        "optional-dependencies"
    ].get(key)
    return [Requirement(line) for line in lines]


def pinned_set() -> dict[str, str]:
    pins = (ROOT / "deploy" / "constraints.txt").read_text("utf-8")
    return dict(re.findall(r"^([\w.-]+)==(\S+)", pins, re.MULTILINE))


def test_every_range_holds_the_tested_version_and_more_than_one():
    pinned = pinned_set()
    extras = PROJECT["project"]["optional-dependencies"]
    for key in ("dependencies", *extras):
        for wanted in requirements(key):
            if wanted.name == "fedllm":
                continue
            name = wanted.name.lower().replace("_", "-")
            assert name in pinned, f"{name}: tools/dependency_ranges.py writes the file"
            assert wanted.specifier.contains(pinned[name], prereleases=True), wanted
            assert "==" not in {part.operator for part in wanted.specifier}, wanted


def test_what_flower_installs_for_a_run_is_the_tested_set_without_torch():
    uv = PROJECT["tool"]["uv"]
    pins = (ROOT / "deploy" / "constraints.txt").read_text("utf-8").splitlines()
    assert set(uv["constraint-dependencies"]) <= set(pins)
    named = {Requirement(line).name for line in uv["constraint-dependencies"]}
    asked = {wanted.name for wanted in requirements("dependencies")}
    assert asked - named == {"flwr", "pip", "torch"}
    (torch,) = (Requirement(line) for line in uv["override-dependencies"])
    assert torch.name == "torch"
    assert torch.marker is not None and not torch.marker.evaluate()


def test_the_citation_names_this_version():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    assert {"cff-version", "message", "title", "authors"} <= set(cited)
    assert cited["version"] == PROJECT["project"]["version"]
    assert cited["license"] == "Apache-2.0"


def imported(path: Path) -> Iterator[str]:
    """Yield the top-level names that a file imports, wherever in the file."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield str(node.module).split(".")[0]


def needed(extra: str) -> set[str]:
    """Return the distributions that fedllm with an extra brings, with all of theirs."""
    found: set[str] = set()
    waiting = [(wanted.name, wanted.extras) for wanted in requirements("dependencies")]
    waiting += [(wanted.name, wanted.extras) for wanted in requirements(extra)]
    seen = set()
    while waiting:
        name, extras = waiting.pop()
        key = (name.lower().replace("_", "-"), frozenset(extras))
        if key in seen:
            continue
        seen.add(key)
        try:
            lines = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue
        found.add(key[0])
        for wanted in map(Requirement, lines):
            for chosen in extras or {""}:
                if wanted.marker is None or wanted.marker.evaluate({"extra": chosen}):
                    waiting.append((wanted.name, wanted.extras))
    return found


def test_tests_import_nothing_but_what_their_extra_installs():
    # Elsewhere more is installed, and a missing line would be seen by a newcomer alone.
    brought = needed("test")
    sources = metadata.packages_distributions()
    for path in (ROOT / "tests").rglob("*.py"):
        for name in set(imported(path)) - OPTIONAL - {"fedllm", "tests"}:
            if name in sys.stdlib_module_names or name not in sources:
                continue
            homes = {home.lower().replace("_", "-") for home in sources[name]}
            assert homes & brought, f"{path}: {name}"


def test_the_lowest_python_is_the_one_that_linters_and_flower_know():
    lowest = PROJECT["tool"]["mypy"]["python_version"]
    assert SpecifierSet(PROJECT["project"]["requires-python"]) == SpecifierSet(
        f">={lowest}"
    )
