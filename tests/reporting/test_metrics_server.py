"""The run's numbers for Prometheus."""

import json
import socket
import urllib.request
from urllib.error import URLError

import pytest

from fedllm.config import fedllm_home
from fedllm.errors import ConfigError
from fedllm.reporting import metrics_server
from fedllm.reporting.monitor import RunMonitor
from tests.helpers.federations import federation, quick, settings
from tests.helpers.sample_runs import line

__all__ = ["quick", "settings"]


@pytest.fixture(autouse=True)
def _package():
    pytest.importorskip("prometheus_client")


@pytest.fixture
def port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def served(port) -> dict[str, float]:
    """What Prometheus reads, by name and labels."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=60) as got:
        text = got.read().decode()
    lines = (row.rpartition(" ") for row in text.splitlines() if row[0] != "#")
    return {name: float(value) for name, _, value in lines}


def monitor_of(tmp_path, port, secret=False) -> RunMonitor:
    monitor = RunMonitor(tmp_path, "none", secret)
    monitor.serve(port, rounds=3)
    return monitor


@pytest.fixture(autouse=True)
def _no_page(monkeypatch):
    monkeypatch.setattr("fedllm.reporting.monitor.write_report", lambda folder: None)


def test_what_a_round_left_is_served_until_the_run_ends(tmp_path, port):
    monitor = monitor_of(tmp_path, port)
    assert served(port) == {"fedllm_running": 1.0, "fedllm_rounds_planned": 3.0}
    for server_round in range(3):
        monitor.note(line(server_round, 4.5))
    found = served(port)

    assert found["fedllm_round"] == 2 and found["fedllm_epsilon"] == 4.5
    assert found["fedllm_clients_answered"] == 4
    assert found['fedllm_bytes_total{direction="up"}'] == 4.5e6
    assert 0 <= found["fedllm_seconds_since_round"] < 600
    monitor.finish()
    with pytest.raises(URLError, match="refused"):
        served(port)


def test_a_null_is_absent(tmp_path, port):
    monitor = monitor_of(tmp_path, port)
    monitor.note(line(1, None))

    found = served(port)
    assert "fedllm_epsilon" not in found and found["fedllm_round"] == 1
    monitor.finish()


def test_of_secret_cohorts_nothing_is_served_that_changes_with_a_round(tmp_path, port):
    monitor = monitor_of(tmp_path, port, secret=True)
    before = served(port)
    monitor.note(line(1, 4.5, secret=True))

    assert served(port) == before
    assert set(before) == {"fedllm_running", "fedllm_rounds_planned"}
    monitor.finish()


def test_a_port_in_use_is_one_line(tmp_path, port):
    with socket.socket() as other:
        other.bind(("127.0.0.1", port))
        other.listen()
        with pytest.raises(ConfigError, match=f"metrics-port: {port} is in use") as got:
            monitor_of(tmp_path, port)
    assert "\n" not in str(got.value)


def test_nothing_listens_beyond_loopback(tmp_path, port):
    monitor = monitor_of(tmp_path, port)

    assert monitor._metrics._server.server_address[0] == "127.0.0.1"
    monitor.finish()


def test_a_missing_package_is_one_line_with_the_command(monkeypatch, tmp_path, port):
    monkeypatch.setattr(metrics_server, "find_spec", lambda _: None)

    with pytest.raises(ConfigError, match="pip install prometheus-client"):
        monitor_of(tmp_path, port)


def test_a_port_in_use_stops_a_run_before_any_client_is_asked(quick, port):
    with socket.socket() as other:
        other.bind(("127.0.0.1", port))
        other.listen()
        with pytest.raises(ConfigError, match="is in use"):
            federation({**quick, "output.metrics-port": port})
    (folder,) = {p.resolve() for p in (fedllm_home() / "runs").iterdir()}
    assert "is in use" in json.loads((folder / "state.json").read_text())["reason"]
