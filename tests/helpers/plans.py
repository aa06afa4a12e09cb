"""The planner's output, as text and as JSON."""

import json

from fedllm.commands import plan


def plan_text(capsys, *arguments: str) -> str:
    plan.main(list(arguments))
    return str(capsys.readouterr().out)


def plan_json(capsys, *arguments: str) -> dict:
    return json.loads(plan_text(capsys, "--json", *arguments))
