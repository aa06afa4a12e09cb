"""Ray is closed before it starts, and what cannot be closed is logged once."""

import os
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from fedllm.deployment import ray_walls

PROBE = """
import sys
if sys.argv[1] == "simulation":
    import flwr.simulation
import fedllm.client_app, os
print(os.environ.get("RAY_AUTH_MODE"), "ray" in sys.modules)
"""


def test_ray_listens_on_loopback_and_asks_for_a_fresh_secret():
    first, second = {"RAY_ADDRESS": "10.0.0.1:6379"}, {}
    ray_walls.close_ray(first, "/a")
    ray_walls.close_ray(second, "/b")

    assert first["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] == "0"
    assert first["RAY_AUTH_MODE"] == "token"
    assert len(first["RAY_AUTH_TOKEN"]) == 64
    assert first["RAY_AUTH_TOKEN"] != second["RAY_AUTH_TOKEN"]
    assert first["RAY_TMPDIR"] == "/a"
    assert "RAY_ADDRESS" not in first


def test_ray_finds_no_port_to_serve_numbers_of_its_own_on():
    environ = {}
    ray_walls.close_ray(environ, "/a")

    port = int(environ["AUTOSCALER_METRIC_PORT"])
    with socket.socket() as listener, pytest.raises(OverflowError):
        listener.bind(("127.0.0.1", port))


def test_a_worker_keeps_the_secret_of_its_cluster(monkeypatch):
    driver = {}
    ray_walls.close_ray(driver, "/the/drivers")
    monkeypatch.setattr(os, "environ", dict(driver))

    ray_walls.close_this_process_ray()

    assert os.environ == driver


def test_a_secret_that_the_user_exports_does_not_leave_ray_open_to_the_network(
    tmp_path, monkeypatch
):
    exported = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "mine"}
    monkeypatch.setattr(os, "environ", exported | {"RAY_TMPDIR": str(tmp_path)})
    at_the_end = []
    monkeypatch.setattr(ray_walls.atexit, "register", at_the_end.append)

    ray_walls.close_this_process_ray()

    assert os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] == "0"
    assert os.environ["RAY_AUTH_TOKEN"] == "mine"
    assert Path(os.environ["RAY_TMPDIR"]).parent == tmp_path
    for cleanup in at_the_end:
        cleanup()
    assert list(tmp_path.iterdir()) == []


def test_nobody_else_may_enter_rays_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))

    with ray_walls.ray_folder() as folder:
        assert Path(folder).parent == tmp_path
        assert stat.S_IMODE(os.stat(folder).st_mode) == 0o700
    assert not Path(folder).exists()


@pytest.mark.parametrize(
    ("where", "printed"), [("simulation", "token False"), ("node", "None False")]
)
def test_the_client_app_closes_ray_in_a_simulation_before_ray_is_there(where, printed):
    env = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    done = subprocess.run(
        [sys.executable, "-c", PROBE, where],
        env=env,
        capture_output=True,
        text=True,
        check=True,
    )

    assert done.stdout.strip() == printed


class InMemoryGrid:
    """By name the grid of a simulation."""


def test_what_flowers_superlink_leaves_open_is_one_line(caplog, monkeypatch):
    monkeypatch.delenv(ray_walls.STARTED_BY_SIMULATE, raising=False)
    ray_walls.warn_of_superlink(object())
    assert caplog.messages == []
    ray_walls.warn_of_superlink(InMemoryGrid())
    (line,) = caplog.messages
    assert "any user of this machine" in line and "fedllm simulate" in line

    monkeypatch.setenv(ray_walls.STARTED_BY_SIMULATE, "1")
    ray_walls.warn_of_superlink(InMemoryGrid())
    assert caplog.messages == [line]


def test_the_grid_of_a_simulation_still_has_that_name():
    from flwr.superlink.grid import InMemoryGrid as Flowers

    assert Flowers.__name__ == InMemoryGrid.__name__
