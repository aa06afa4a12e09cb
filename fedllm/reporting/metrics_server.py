"""The run's numbers for Prometheus, on loopback, while the run lasts.

It serves what the lines of metrics.jsonl have, and a value that is null there is absent here.
Prometheus stamps each answer with the time, so if the length of a round is secret, no value of a
round is served: only that the run lasts, and how many rounds it planned.
"""

import errno
import time
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from fedllm.errors import ConfigError

if TYPE_CHECKING:
    from prometheus_client import Metric

LOOPBACK = "127.0.0.1"
_VALUES = {
    "server_round": ("fedllm_round", "The last finished round; 0: the untuned model"),
    "epsilon": ("fedllm_epsilon", "Epsilon spent by the end of that round"),
    "validation_loss": ("fedllm_validation_loss", "Loss on public validation rows"),
    "clients_asked": ("fedllm_clients_asked", "Clients asked in that round"),
    "clients_answered": ("fedllm_clients_answered", "Clients that answered in it"),
    "clients_rejected": ("fedllm_clients_rejected", "Answers without a usable update"),
}
_BYTES = {"megabytes_down": "down", "megabytes_up": "up"}


class MetricsServer:
    """Serves a run's numbers until it is closed.

    Args:
        port: On 127.0.0.1.
        rounds: Rounds that the run planned.
        secret_cohorts: Whether the length of a round is secret.

    Raises:
        ConfigError: The port is in use, or prometheus-client is not installed.
    """

    def __init__(self, port: int, rounds: int, secret_cohorts: bool) -> None:
        if find_spec("prometheus_client") is None:
            raise ConfigError(
                "output.metrics-port: prometheus-client is not installed: pip install "
                "prometheus-client, or set output.metrics-port=0"
            )
        from prometheus_client import CollectorRegistry, start_http_server

        self._rounds = rounds
        self._secret_cohorts = secret_cohorts
        self._line: Mapping[str, Any] = {}
        self._bytes = dict.fromkeys(_BYTES.values(), 0.0)
        self._noted = time.monotonic()
        registry = CollectorRegistry()
        registry.register(self)
        try:
            self._server, self._thread = start_http_server(port, LOOPBACK, registry)
        except OSError as error:
            reason = "is in use" if error.errno == errno.EADDRINUSE else error.strerror
            raise ConfigError(
                f"output.metrics-port: {port} {reason} on {LOOPBACK}: choose another, or 0 "
                "for none"
            ) from None

    def note(self, line: Mapping[str, Any]) -> None:
        """Serve a round that metrics.jsonl holds, unless the length of rounds is secret."""
        if self._secret_cohorts:
            return
        for key, direction in _BYTES.items():
            self._bytes[direction] += 1e6 * (line.get(key) or 0.0)
        self._line = dict(line)
        self._noted = time.monotonic()

    def collect(self) -> "Iterator[Metric]":
        """Return the metrics, as prometheus-client asks for them; unknown ones are left out."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        yield GaugeMetricFamily("fedllm_running", "1 while the run lasts", 1)
        yield GaugeMetricFamily(
            "fedllm_rounds_planned", "Rounds that the run planned", self._rounds
        )
        line = self._line
        for key, (name, meaning) in _VALUES.items():
            value = line.get(key)
            if value is not None:
                yield GaugeMetricFamily(name, meaning, value)
        if not line:
            return
        since = time.monotonic() - self._noted
        yield GaugeMetricFamily(
            "fedllm_seconds_since_round", "Seconds since the last round ended", since
        )
        sent = CounterMetricFamily(
            "fedllm_bytes", "Bytes of arrays in all rounds so far", labels=["direction"]
        )
        for direction, total in self._bytes.items():
            sent.add_metric([direction], total)
        yield sent

    def close(self) -> None:
        """Stop serving, and free the port."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
