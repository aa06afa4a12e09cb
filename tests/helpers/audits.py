"""Audits of a size that takes a second."""

from fedllm.auditing.auditor import Auditor
from fedllm.commands.audit import main
from fedllm.config import parse_run_config
from fedllm.planning.noise import privacy_settings
from fedllm.strategy.build import make_strategy
from tests.helpers.commands import exit_status

CLIENTS, CANARIES, DIMENSION = 8, 100, 4000


def private(**keys):
    return parse_run_config({"num-server-rounds": 3, **keys})


def auditor(config=None, make=make_strategy, **changes):
    config = config or private()
    sizes = {"num_clients": CLIENTS, "num_canaries": CANARIES, "dimension": DIMENSION}
    settings = privacy_settings(config, CLIENTS, DIMENSION)
    return Auditor(config, settings, make=make, **{**sizes, **changes})


def failed(audit):
    return {check.name for check in audit.checks if not check.passed}


SMALL = ["--canaries", "50", "--dimension", "1000", "--clients", "5"]


def audit(*arguments: str) -> object:
    return exit_status(main, [*arguments, *SMALL])
