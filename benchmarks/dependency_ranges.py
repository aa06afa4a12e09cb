"""Test both ends of every range in pyproject.toml: the lowest and the highest versions.

    python benchmarks/dependency_ranges.py                 # both ends, 2.5 GB of disk at a time
    python benchmarks/dependency_ranges.py lowest-direct   # one end
    python benchmarks/dependency_ranges.py --write-constraints

uv, which comes with Flower, resolves; pip installs, because it knows your settings for
torch. Then every module of fedllm is imported and the fast tests run, in an environment
that is deleted afterwards. The last form writes deploy/constraints.txt, the versions that
the container images install.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from uv import find_uv_bin

ROOT = Path(__file__).parent.parent
CONSTRAINTS = ROOT / "deploy" / "constraints.txt"
ENDS = ("lowest-direct", "highest")
FAST_TESTS = (
    "tests/privacy",
    "tests/commands/test_keys.py",
    "tests/adapters/test_peft_model.py",
    "tests/test_config.py",
    "tests/wire/test_messages.py",
    "tests/runs/test_directory.py",
    "tests/strategy/test_fedavg.py",
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
    parser.add_argument("--write-constraints", action="store_true")
    args = parser.parse_args()
    if unknown := set(args.ends) - set(ENDS):
        parser.error(f"unknown: {', '.join(unknown)}; known: {', '.join(ENDS)}")
    if args.write_constraints:
        CONSTRAINTS.write_text(pins("highest"))
        return
    for end in args.ends or ENDS:
        with tempfile.TemporaryDirectory(prefix=f"fedllm-{end}-") as folder:
            check(end, Path(folder))
        print(f"{end}: passed")


def pins(end: str, *more: str) -> str:
    """Return one version for each package that pyproject.toml needs."""
    command = [find_uv_bin(), "pip", "compile", "pyproject.toml", "--universal"]
    command += ["--python-version", "3.11", "--resolution", end, "--quiet"]
    # Our setting for `flwr run`, which leaves torch out, is not meant here.
    command += ["--no-config", "--no-header", "--no-annotate", *more]
    done = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE)
    return done.stdout.decode()


def check(end: str, folder: Path) -> None:
    """Install one end into a fresh environment, import and test."""
    (folder / "pins.txt").write_text(pins(end, "--extra", "test"))
    subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True)
    python = folder / "venv" / "bin" / "python"
    # Constraints, not requirements: a CPU build of torch needs no package of CUDA's.
    install = [python, "-m", "pip", "install", "--quiet"]
    install += ["--constraint", folder / "pins.txt", "-e", ".[test]"]
    subprocess.run(install, cwd=ROOT, check=True)
    subprocess.run([python, "-c", IMPORT_ALL], check=True)
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [python, "-m", "pytest", "-q", *FAST_TESTS]
    subprocess.run(command, cwd=ROOT, check=True, env=env)


if __name__ == "__main__":
    main()
