"""The simulation's process: the apps get their run config, and errors are one line."""

import json
import logging
import sys
import types

import flwr.simulation
import pytest
from flwr.app import Context, RecordDict

from fedllm.deployment import simulated_run
from fedllm.errors import ConfigError

RUN_CONFIG = {"seed": 7}


@pytest.fixture
def apps(monkeypatch):
    """A module with two apps that keep the run config they are given."""
    seen = []

    def client(message, context):
        seen.append(dict(context.run_config))
        return message

    def server(grid, context):
        seen.append(dict(context.run_config))

    # A filter stays with the logger.
    monkeypatch.setattr(logging.getLogger("flwr"), "filters", [])
    module = types.SimpleNamespace(client=client, server=server)
    monkeypatch.setitem(sys.modules, "their_apps", module)
    return seen


def context() -> Context:
    return Context(1, 2, {}, RecordDict(), {})


def test_a_client_sees_the_run_config_and_flower_gets_its_context_back(apps):
    app = simulated_run.ConfiguredClientApp("their_apps:client", RUN_CONFIG)
    given = context()

    assert app("a message", given) == "a message"
    assert apps == [RUN_CONFIG]
    # Flower rejects a context with another run config than it gave.
    assert given.run_config == {}


def test_the_server_sees_the_run_config(apps):
    app = simulated_run.configured_server_app("their_apps:server", RUN_CONFIG)
    app(None, context())

    assert apps == [RUN_CONFIG]


@pytest.mark.parametrize(("error", "status"), [(None, 0), (ConfigError("x: bad"), 1)])
def test_what_the_user_can_mend_is_a_status_and_no_traceback(
    apps, tmp_path, monkeypatch, error, status
):
    calls = []

    def run_simulation(**arguments):
        calls.append(arguments)
        if error is not None:
            raise error

    monkeypatch.setattr(flwr.simulation, "run_simulation", run_simulation)
    file = tmp_path / "run.json"
    references = {"serverapp": "their_apps:server", "clientapp": "their_apps:client"}
    numbers = {"num_clients": 3, "client_cpus": 2}
    file.write_text(json.dumps({**references, **numbers, "run_config": RUN_CONFIG}))

    assert simulated_run.main([str(file)]) == status
    assert calls[0]["num_supernodes"] == 3
    assert calls[0]["backend_config"]["client_resources"]["num_cpus"] == 2


def test_an_error_that_is_not_foreseen_keeps_its_traceback(apps, tmp_path, monkeypatch):
    def run_simulation(**_):
        raise ZeroDivisionError

    monkeypatch.setattr(flwr.simulation, "run_simulation", run_simulation)
    file = tmp_path / "run.json"
    references = {"serverapp": "their_apps:server", "clientapp": "their_apps:client"}
    numbers = {"num_clients": 3, "client_cpus": 2}
    file.write_text(json.dumps({**references, **numbers, "run_config": {}}))
    with pytest.raises(ZeroDivisionError):
        simulated_run.main([str(file)])


def test_noise_of_flower_is_dropped_and_nothing_else(caplog):
    flower = logging.getLogger("flwr.test")
    flower.addFilter(simulated_run.without_noise)
    flower.warning("DEPRECATED FEATURE: %s", "run_simulation")
    flower.warning("Manually terminating %s", "ClientAppActor")
    flower.warning("an actor died")

    assert caplog.messages == ["an actor died"]
