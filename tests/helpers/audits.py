"""Audits of a size that takes a second."""

import pytest

from fedllm.auditing.auditor import Auditor
from fedllm.auditing.sealed_auditor import SealedAuditor
from fedllm.commands.audit import main
from fedllm.commands.sealed_parties import SealedParties
from fedllm.config_parsing import parse_run_config
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


def sealed(**keys):
    """A sealed run's config: three trustees, of whom one may be the server's."""
    given = {"privacy.trust": "trustees", "privacy.trustees": "a,b,c"}
    return private(**{**given, "privacy.post-quantum": False, **keys})


def sealed_auditor(config=None, **changes):
    config = config or sealed()
    sizes = {"num_clients": CLIENTS, "num_canaries": CANARIES, "dimension": DIMENSION}
    settings = privacy_settings(config, CLIENTS, DIMENSION)
    return SealedAuditor(
        config, settings, make_parties=SealedParties, **{**sizes, **changes}
    )


@pytest.fixture
def quick(monkeypatch):
    """No waiting for a disk: what is on it after a power cut is not what is tested."""
    monkeypatch.setattr("os.fsync", lambda descriptor: None)
