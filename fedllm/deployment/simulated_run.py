"""The process of a simulation: server and clients on Flower's engine, without a SuperLink.

    python -P -m fedllm.deployment.simulated_run run.json

A SuperLink executes whatever any user of the machine posts to its port. Flower's
`run_simulation` needs none. It hands the apps no run config, so that is done here.
"""

import json
import logging
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from fedllm.errors import FedllmError


class ConfiguredClientApp(ClientApp):
    """The app's ClientApp, called with the run config in its context.

    Args:
        reference: Where it is, as `module:attribute`.
        run_config: The fused run config.
    """

    def __init__(self, reference: str, run_config: dict[str, Any]) -> None:
        super().__init__()
        self._reference = reference
        self._run_config = run_config

    def __call__(self, message: Message, context: Context) -> Message:
        """Answer a message; called in a process of Ray."""
        logging.getLogger("flwr").addFilter(without_noise)
        # Flower keeps the context for the next message, and rejects one whose run config
        # is another.
        given = context.run_config
        context.run_config = dict(self._run_config)
        try:
            answer: Message = _load(self._reference)(message, context)
        finally:
            context.run_config = given
        return answer


def configured_server_app(reference: str, run_config: dict[str, Any]) -> ServerApp:
    """Return the app's ServerApp, called with the run config in its context.

    Args:
        reference: Where it is, as `module:attribute`.
        run_config: The fused run config.
    """
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        context.run_config = dict(run_config)
        _load(reference)(grid, context)

    return app


def _load(reference: str) -> Any:
    """Return what a reference names."""
    module, _, attribute = reference.partition(":")
    return getattr(import_module(module), attribute)


# The advice to use `flwr run`, which leaves a SuperLink that all can reach; and that a
# client's process ends with the run.
_NOISE = ("DEPRECATED FEATURE", "Manually terminating")


def without_noise(record: logging.LogRecord) -> bool:
    """Drop what Flower logs and a user cannot act on."""
    return not str(record.msg).startswith(_NOISE)


def main(arguments: list[str] | None = None) -> int:
    """Run the simulation that a file describes; return 0 if it completed."""
    (path,) = sys.argv[1:] if arguments is None else arguments
    run = json.loads(Path(path).read_text("utf-8"))
    # An app that cannot be imported fails here, and not in each client.
    _load(run["clientapp"])
    from flwr.simulation import run_simulation

    logging.getLogger("flwr").addFilter(without_noise)
    try:
        run_simulation(
            server_app=configured_server_app(run["serverapp"], run["run_config"]),
            client_app=ConfiguredClientApp(run["clientapp"], run["run_config"]),
            num_supernodes=run["num_clients"],
            backend_config={
                "client_resources": {"num_cpus": run["client_cpus"], "num_gpus": 0.0}
            },
        )
    except FedllmError:
        # The ServerApp has logged it, as one line.
        return 1
    return 0


if __name__ == "__main__":
    # By its own name, by which the clients' processes import it too.
    sys.exit(import_module("fedllm.deployment.simulated_run").main())
