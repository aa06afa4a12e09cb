"""The planner's output, as text and as JSON."""

import json

from fedllm.commands import plan


def told(capsys, *arguments: str) -> str:
    plan.main(list(arguments))
    return str(capsys.readouterr().out)


def planned(capsys, *arguments: str) -> dict:
    return json.loads(told(capsys, "--json", *arguments))
