"""Every command that the README and the pages show can be typed: flags and settings exist.

What they do when they run is for the tests of each; here nothing is started. Every test that
a page names exists too.
"""

import re
import shlex
from importlib import import_module
from pathlib import Path

import pytest
from flwr.common.config import parse_config_args
from flwr.superlink.cli.flower_superlink import _parse_args_run_superlink
from flwr.supernode.cli.flower_supernode import _parse_args_run_supernode

from fedllm.commands.main import COMMANDS
from fedllm.commands.options import read_settings
from fedllm.config_parsing import parse_run_config

ROOT = Path(__file__).parent.parent
OURS = (
    rf"fedllm (?:{'|'.join(COMMANDS)})|python -m fedllm\.commands\.\w+|"
    r"python evaluate\.py|flwr run"
)
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/*.md"))]
SECURITY = ROOT / "SECURITY.md"


def shown() -> list[tuple[str, str]]:
    """Return (page, command) for each of ours, in blocks and in running text."""
    found = []
    for page in PAGES:
        text = page.read_text("utf-8").replace("\\\n", " ")
        blocks = re.findall(r"^```bash\n(.*?)^```", text, re.M | re.S)
        lines = [line.strip() for block in blocks for line in block.splitlines()]
        lines += [
            " ".join(t.split()) for t in re.findall(r"(?<!`)`([^`]+)`(?!`)", text)
        ]
        for line in lines:
            for command in line.split(" && "):
                ours = re.search(rf"(?<![\w-])({OURS})(?![\w-]).*", command)
                if ours and not re.search(r"\.\.\.|FILE|DIR|NAME|=N\b", command):
                    found.append((page.name, ours.group().split("  #")[0].strip()))
    return sorted(set(found))


SHOWN = shown()


def test_there_are_commands_to_check():
    assert len(SHOWN) > 20
    assert {"README.md", "getting-started.md", "privacy.md"} <= {p for p, _ in SHOWN}


@pytest.mark.parametrize(("page", "command"), SHOWN)
def test_a_command_that_is_shown_can_be_typed(page, command, monkeypatch):
    monkeypatch.chdir(ROOT)
    words = shlex.split(command)
    if words[0] == "flwr":
        assert set(flags(words)) <= {"--stream", "--run-config", "--federation-config"}
    else:
        parse(*command_line(words))
    for typed in values(words, "--run-config"):
        if typed.startswith("~"):
            continue  # A file that the page has just had the reader write.
        parse_run_config(read_settings([typed]))
    for typed in values(words, "--federation-config"):
        assert parse_config_args([typed])["num-supernodes"] > 0


def command_line(words: list[str]) -> tuple[str, list[str]]:
    """Return a command of ours and its arguments."""
    if words[:2] == ["python", "evaluate.py"]:
        return "evaluate", words[2:]
    if words[0] == "python":
        return words[2].rpartition(".")[2], words[3:]
    return words[1], words[2:]


def parse(name: str, arguments: list[str]) -> None:
    """Parse a command's arguments, and what it hands on by the parser of Flower.

    A text may only name a command, or an option without its value: then these exist.
    """
    parser = import_module(f"fedllm.commands.{name}").parser()
    flowers = {
        "superlink": _parse_args_run_superlink,
        "supernode": _parse_args_run_supernode,
    }
    options = parser._option_string_actions
    last = options.get(arguments[-1]) if arguments else None
    lacks_value = last is not None and last.nargs is None
    if arguments == ["--help"]:
        return
    if name in flowers:
        flowers[name]().parse_args(parser.parse_known_args(arguments)[1])
    elif lacks_value or not arguments:
        assert set(flags(arguments)) <= set(options)
    else:
        parser.parse_args(arguments)


def flags(words: list[str]) -> list[str]:
    return [word for word in words if word.startswith("--")]


def values(words: list[str], flag: str) -> list[str]:
    return [words[i + 1] for i, word in enumerate(words[:-1]) if word == flag]


def defined() -> set[str]:
    """Return the name of each test function and the path of each file of tests."""
    paths = [*ROOT.glob("tests/**/*.py")]
    names = {
        name
        for path in paths
        for name in re.findall(r"^def (test_\w+)", path.read_text("utf-8"), re.M)
    }
    return names | {path.relative_to(ROOT).as_posix() for path in paths}


@pytest.mark.parametrize("page", [SECURITY, *PAGES], ids=lambda page: page.name)
def test_every_test_that_a_page_names_exists(page):
    words = re.findall(r"`([^`\s]+)`", page.read_text("utf-8"))
    named = {w for w in words if re.fullmatch(r"test_\w+|tests/[\w/]+\.py", w)}

    assert named - defined() == set()


def promises() -> list[list[str]]:
    """Return the cells of each row under "What is promised"."""
    section = SECURITY.read_text("utf-8").split("## What is promised\n")[1]
    section = section.split("\n## ")[0]
    rows = [line.split("|")[1:-1] for line in section.splitlines() if line[:1] == "|"]
    cells = [[cell.strip() for cell in row] for row in rows]
    return [row for row in cells if row[0] != "promise" and set(row[0]) != {"-"}]


def test_every_promise_names_who_is_hostile_what_holds_it_and_a_test():
    rows = promises()

    assert len(rows) > 25
    for row in rows:
        assert len(row) == 5 and all(row[:4]), row
        assert re.fullmatch(r"`test_\w+`(, `test_\w+`)*", row[3]), row
