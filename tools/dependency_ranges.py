"""Test both ends of every range in pyproject.toml: the lowest and the highest versions.

    python tools/dependency_ranges.py                   # both ends
    python tools/dependency_ranges.py lowest-direct     # one end
    python tools/dependency_ranges.py highest --torch 2.14.1
    python tools/dependency_ranges.py --write-constraints --upgrade flwr
    python tools/dependency_ranges.py --write-locks

uv, which comes with Flower, resolves; pip installs, because it knows your settings for
torch. Then every module of fedllm is imported and the fast tests run, in an environment
that is deleted afterwards. It borrows from the environment at hand what that has in the
right version, so run this in one that was installed with `-c deploy/constraints.txt`.

--write-constraints writes deploy/constraints.txt, the tested set, anew, and the part of it
in pyproject.toml that `flwr run` keeps to. A version stays as it is unless the ranges
exclude it or --upgrade names the package. Then, as --write-locks does alone, it writes what
the images install, with the SHA-256 of every file of each version: deploy/requirements.lock,
and deploy/torch.lock with torch and the packages of CUDA. The hashes are PyPI's.
"""

import argparse
import os
import re
import subprocess
import sys
import sysconfig
import tempfile
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from uv import find_uv_bin

ROOT = Path(__file__).parent.parent
PROJECT = ROOT / "pyproject.toml"
CONSTRAINTS = ROOT / "deploy" / "constraints.txt"
LOCK = ROOT / "deploy" / "requirements.lock"
TORCH_LOCK = ROOT / "deploy" / "torch.lock"
BUILD_BACKEND = "hatchling"
ENDS = ("lowest-direct", "highest")
FAST_TESTS = (
    "tests/privacy",
    "tests/strategy",
    "tests/wire",
    "tests/adapters",
    "tests/commands/test_keys.py",
    "tests/runs/test_directory.py",
    "tests/test_config.py",
    "tests/test_config_parsing.py",
    "tests/test_config_rules.py",
)
IMPORT_ALL = """
import importlib, pkgutil, fedllm
for module in pkgutil.walk_packages(fedllm.__path__, "fedllm."):
    importlib.import_module(module.name)
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("ends", nargs="*", metavar="END", help=" or ".join(ENDS))
    parser.add_argument(
        "--torch",
        default=tested("torch"),
        metavar="VERSION",
        help="the torch of both ends (default: %(default)s, the tested one; a newer one"
        " may bring several GB of CUDA packages)",
    )
    parser.add_argument("--write-constraints", action="store_true")
    parser.add_argument("--write-locks", action="store_true")
    parser.add_argument("--upgrade", nargs="+", default=[], metavar="PACKAGE")
    args = parser.parse_args()
    if unknown := set(args.ends) - set(ENDS):
        parser.error(f"unknown: {', '.join(unknown)}; known: {', '.join(ENDS)}")
    if args.write_constraints:
        write_constraints(args.upgrade)
    if args.write_constraints or args.write_locks:
        write_locks()
        return
    for end in args.ends or ENDS:
        with tempfile.TemporaryDirectory(prefix=f"fedllm-{end}-") as folder:
            check(end, args.torch, Path(folder))
        print(f"{end}: passed")


def tested(package: str) -> str:
    """Return the version of a package in deploy/constraints.txt."""
    pins = CONSTRAINTS.read_text(encoding="utf-8")
    found = re.search(rf"^{re.escape(package)}==(\S+)", pins, re.MULTILINE)
    assert found is not None, f"{CONSTRAINTS}: no {package}"
    return found[1]


def write_constraints(upgraded: list[str]) -> None:
    """Write one version for each package that fedllm or one of its extras needs."""
    more = [word for name in upgraded for word in ("--upgrade-package", name)]
    compile_pins("--all-extras", *more, "--output-file", str(CONSTRAINTS))
    text = PROJECT.read_text(encoding="utf-8")
    head, start, rest = text.partition("constraint-dependencies = [\n")
    assert start, f"{PROJECT}: no constraint-dependencies"
    lines = "".join(f'    "{pin}",\n' for pin in direct_pins())
    tail = rest[rest.index("]\n") :]
    PROJECT.write_text(head + start + lines + tail, encoding="utf-8")


def write_locks() -> None:
    """Write the packages of the images with the hashes of their files."""
    with tempfile.TemporaryDirectory(prefix="fedllm-lock-") as folder:
        backend, whole = Path(folder) / "build.in", Path(folder) / "lock"
        backend.write_text(f"{BUILD_BACKEND}\n")
        options = ["--generate-hashes", "--default-index", "https://pypi.org/simple"]
        options += ["--constraint", str(CONSTRAINTS), "--output-file", str(whole)]
        compile_pins(*options, str(backend))
        entries = re.split(r"\n(?=\S)", whole.read_text("utf-8").strip())
    of_torch = [entry for entry in entries if is_of_torch(entry)]
    others = [entry for entry in entries if entry not in of_torch]
    for path, kept in ((LOCK, others), (TORCH_LOCK, of_torch)):
        path.write_text("\n".join(kept) + "\n", encoding="utf-8")


def is_of_torch(entry: str) -> bool:
    """Return whether another build of torch comes without, or instead of, a package."""
    return entry.startswith(("torch==", "triton==", "nvidia-", "cuda-"))


def direct_pins() -> list[str]:
    """Return the tested set, of the packages that fedllm itself names.

    Flower never installs itself into the environment of a run, and torch is left out.
    """
    asked = tomllib.loads(PROJECT.read_text(encoding="utf-8"))["project"]
    names = {Requirement(line).name for line in asked["dependencies"]}
    pins = CONSTRAINTS.read_text(encoding="utf-8").splitlines()
    return [
        pin
        for pin in pins
        if pin.partition("==")[0] in names - {"flwr", "torch", "pip"}
    ]


def compile_pins(*options: str) -> None:
    """Resolve pyproject.toml for all systems."""
    command = [find_uv_bin(), "pip", "compile", "pyproject.toml", "--universal"]
    command += ["--python-version", "3.11", "--quiet", "--no-header", "--no-annotate"]
    # Our settings for `flwr run`, which leave torch out, are not meant here.
    subprocess.run([*command, "--no-config", *options], cwd=ROOT, check=True)


def check(end: str, torch: str, folder: Path) -> None:
    """Install one end into a fresh environment, import every module and test."""
    held, pins = folder / "held.txt", folder / "pins.txt"
    held.write_text(f"torch=={torch}\n")
    # Of all extras, or what is installed here would not fit what is borrowed.
    options = ["--resolution", end, "--all-extras", "--constraint", str(held)]
    compile_pins(*options, "--output-file", str(pins))
    subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True)
    borrow(folder / "venv")
    python = folder / "venv" / "bin" / "python"
    # Constraints, not requirements: a CPU build of torch needs no package of CUDA's.
    install = [python, "-m", "pip", "install", "--quiet", "--no-compile"]
    # Of what is borrowed some is of no extra that is installed, and need not fit.
    install.append("--no-warn-conflicts")
    subprocess.run(
        [*install, "--constraint", pins, "-e", ".[test]"], cwd=ROOT, check=True
    )
    subprocess.run([python, "-c", IMPORT_ALL], check=True)
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [python, "-m", "pytest", "-q", "-n", "auto", *FAST_TESTS]
    subprocess.run(command, cwd=ROOT, check=True, env=env)


def borrow(environment: Path) -> None:
    """Let an environment see this one's packages behind its own."""
    (packages,) = environment.glob("lib/python*/site-packages")
    here = sysconfig.get_paths()["purelib"]
    (packages / "borrowed.pth").write_text(f"{here}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
