"""A run by name, and its original settings, sent to clients with every message once resumed.

A user who resumes types `resume.from` and nothing else, so the run config that Flower
hands the clients is not that of the run.
"""

import hashlib
import json

from flwr.app import Context, Message

from fedllm.config import RunConfig, flat
from fedllm.errors import ConfigError
from fedllm.wire.messages import CONFIG

ORIGINAL_RUN = "original-run"
"""Key of a message's config that holds them, as JSON."""


_PROMISED_BY = (
    "num-server-rounds",
    "strategy.num-clients",
    "strategy.sampling",
    "strategy.fraction-train",
    "privacy.unit",
    "privacy.target-epsilon",
    "privacy.noise-multiplier",
    "privacy.delta",
    "privacy.max-epsilon",
)


def run_name(config: RunConfig, run_id: int) -> str:
    """Return a name of the run and of all settings that its promise depends on.

    Not of others: what a run chose for itself (`adapter.kind="auto"`) is among its settings
    only once it is resumed. Of a sealed run the whole hash is the name: its server, which is
    not trusted, could find two promises that share 16 digits, and have one charged.

    Args:
        config: The settings that the run began with.
        run_id: Flower's id of the run when it began.
    """
    settings = flat(config)
    parts = [run_id, *(settings[key] for key in _PROMISED_BY)]
    digest = hashlib.sha256(repr(parts).encode()).hexdigest()
    return digest if config.is_sealed else digest[:16]


def original_run(config: RunConfig, run_id: int) -> str:
    """Return the settings as JSON, for `original_context` to read.

    Args:
        config: The settings that the run began with.
        run_id: Flower's id of the run when it began.
    """
    return json.dumps({"run_config": flat(config), "run_id": run_id})


def original_context(message: Message, context: Context) -> Context:
    """Return the context as the run had it when it began.

    A server may name other settings only if the run config that the node was given
    resumes a run. The node's limits are checked against what is returned.

    Raises:
        ConfigError: The run is resumed, and the message does not hold its settings.
    """
    if not context.run_config.get("resume.from"):
        return context
    try:
        record = message.content.config_records[CONFIG]
        original = json.loads(str(record[ORIGINAL_RUN]))
        run_id, run_config = int(original["run_id"]), dict(original["run_config"])
    except (KeyError, ValueError, TypeError):
        raise ConfigError(
            "resume.from: is set, and the server does not name the run that is resumed"
        ) from None
    return Context(
        run_id, context.node_id, context.node_config, context.state, run_config
    )
