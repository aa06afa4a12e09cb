"""Folders of deployment keys, and what they hold."""

from fedllm.commands import keys


def make(folder, *more: str) -> None:
    others = {"--add-node", "--add-reviewer"}
    name = [] if others & {*more} else ["--server-name", "fl.example.org"]
    keys.main(["--out", str(folder), *name, *more])


def contents(folder) -> dict:
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
