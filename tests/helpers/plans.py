"""The planner's output, as text and as JSON."""

import json

from fedllm.commands import plan

# Five rounds of one step: what most of the measured federations are alike in.
ONE_STEP = (
    "--run-config",
    "num-server-rounds=5 train.local-steps=1 train.learning-rate=1.0 "
    "train.learning-rate-min=1.0 strategy.server-learning-rate=0.6 "
    "strategy.server-learning-rate-min=0.6 privacy.clipping-norm=0.6",
)


def plan_text(capsys, *arguments: str) -> str:
    plan.main(list(arguments))
    return str(capsys.readouterr().out)


def plan_json(capsys, *arguments: str) -> dict:
    return json.loads(plan_text(capsys, "--json", *arguments))
