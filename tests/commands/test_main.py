"""The script `fedllm`: the list of commands, the chosen one, errors and completion."""

import os
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from fedllm.commands import main as script
from fedllm.errors import ConfigError
from tests.helpers.commands import exit_status

HEAVY = {"torch", "flwr", "pydantic", "numpy", "transformers", "argcomplete", "psutil"}
LISTED = f"""
import sys
from fedllm.commands.main import main
main(sys.argv[1:])
loaded = {HEAVY!r} & set(sys.modules)
ours = [m for m in sys.modules if m.startswith("fedllm.commands.")]
assert not loaded and len(ours) == 2, (loaded, ours)
"""


def run_python(code: str, *words: str, **more: object):
    command = [sys.executable, "-c", code, *words]
    return subprocess.run(
        command, capture_output=True, text=True, check=True, **more  # type: ignore
    ).stdout


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"]])
def test_alone_it_lists_the_commands_and_imports_none_of_them(words):
    lines = run_python(LISTED, *words).splitlines()

    assert [line.split()[0] for line in lines[1:]] == list(script.COMMANDS)
    assert len(lines) <= 15 and max(map(len, lines)) <= 80


def test_the_version_is_the_installed_packages(capsys):
    script.main(["--version"])

    assert re.fullmatch(r"fedllm \d+\.\d+\.\d+\S*\n", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("word", "remedy"),
    [
        ("simulat", "did you mean simulate?"),
        ("supernodes", "did you mean supernode?"),
        ("qqq", "`fedllm` lists them"),
        ("--verbose", "`fedllm` lists them"),
    ],
)
def test_an_unknown_command_is_one_line_with_the_nearest_name(word, remedy):
    ended = exit_status(script.main, [word, "--clients", "3"])

    assert ended == f"ConfigError: {word}: no such command: {remedy}"


def test_every_module_with_a_main_is_a_command():
    folder = Path(script.__file__).parent
    modules = {
        p.stem for p in folder.glob("*.py") if "\nmain = main_of(" in p.read_text()
    }

    assert modules - {"main"} == set(script.COMMANDS)


NAMES = list(script.COMMANDS)


@pytest.mark.parametrize("name", NAMES)
def test_a_command_has_a_parser_that_bears_its_name_and_explains_every_option(name):
    module = import_module(f"fedllm.commands.{name}")
    parser = module.parser()

    assert parser.prog == f"fedllm {name}" and parser.description
    assert [a.dest for a in parser._actions if not a.help] == []


REPORTS = [n for n in NAMES if n not in ("demo", "superlink", "supernode")]


@pytest.mark.parametrize("name", REPORTS)
def test_every_command_that_reports_has_json(name):
    parser = import_module(f"fedllm.commands.{name}").parser()

    assert "--json" in parser._option_string_actions


SHARED = {
    "--run-config": {"simulate", "compare", "plan", "audit", "doctor"},
    "--clients": {"simulate", "compare", "plan", "audit"},
    "--out": {"compare", "export", "keys"},
    "--home": {"node", "superlink", "supernode"},
}


@pytest.mark.parametrize("flag", SHARED)
def test_a_shared_flag_takes_the_same_values_in_every_command(flag):
    found = {}
    for name in NAMES:
        parser = import_module(f"fedllm.commands.{name}").parser()
        if action := parser._option_string_actions.get(flag):
            found[name] = (type(action).__name__, action.metavar, action.nargs)

    assert set(found) == SHARED[flag]
    assert len(set(found.values())) == 1, found


@pytest.mark.parametrize("first", [["fedllm"], ["python", "-m"]])
def test_an_error_of_any_command_is_a_line_of_one_form_on_stderr(
    monkeypatch, capsys, first
):
    from fedllm.commands import runs

    def fail(*_):
        raise ConfigError("a.key: must be > 0 (got 0)\nb.key: unknown")

    monkeypatch.setattr(runs, "find_run", fail)
    words = ["latest"]
    ended = (
        exit_status(script.main, ["runs", *words])
        if first == ["fedllm"]
        else exit_status(runs.main, words)
    )

    # A text is printed to stderr by the interpreter, with status 1.
    assert ended == (
        "ConfigError: a.key: must be > 0 (got 0)\nConfigError: b.key: unknown"
    )
    assert capsys.readouterr().out == ""


def completions(line: str, tmp_path: Path) -> set[str]:
    """Return what a shell would offer at the end of a line."""
    answer = tmp_path / "answer"
    env = os.environ | {
        "_ARGCOMPLETE": "1",
        "_ARGCOMPLETE_STDOUT_FILENAME": str(answer),
        "_ARGCOMPLETE_IFS": "\n",
        "COMP_LINE": line,
        "COMP_POINT": str(len(line)),
        "COMP_TYPE": "9",
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }
    (tmp_path / "myapp").mkdir()
    code = "from fedllm.commands.main import main\nmain()"
    run_python(code, env=env, cwd=tmp_path)
    return {word.strip() for word in answer.read_text().splitlines()}


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("fedllm ", {*script.COMMANDS, "-h", "--help", "--version"}),
        ("fedllm pl", {"plan"}),
        ("fedllm plan", {"plan"}),
        ("fedllm super", {"superlink", "supernode"}),
        ("fedllm --ver", {"--version"}),
        ("fedllm runs --js", {"--json"}),
        ("fedllm runs latest --js", {"--json"}),
        ("fedllm simulate my", {"myapp/"}),
        ("fedllm keys --out x --no", {"--nodes"}),
        ("fedllm supernode --h", {"--home"}),
        ("fedllm evaluate --quantization ", {"0", "4", "8"}),
    ],
)
def test_a_shell_completes_commands_and_the_options_of_one(line, offered, tmp_path):
    assert completions(line, tmp_path) == offered
