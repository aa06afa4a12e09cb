"""What a resumed run tells its clients: whose settings hold, and which run it still is.

Whoever resumes types `resume.from` and nothing else, so the run config that Flower hands
the clients is not that of the run. The server sends it with every message.
"""

import json

from flwr.app import Context, Message

from fedllm.config import RunConfig, flat
from fedllm.errors import ConfigError
from fedllm.wire.messages import CONFIG

ORIGINAL_RUN = "original-run"
"""Where a message has it, as JSON."""


def original_run(config: RunConfig, run_id: int) -> str:
    """Write for clients what `original_context` reads.

    Args:
        config: The settings that the run began with.
        run_id: Flower's id of the run when it began.
    """
    return json.dumps({"run_config": flat(config), "run_id": run_id})


def original_context(message: Message, context: Context) -> Context:
    """Return the context as the run had it when it began.

    A server may name other settings only where the run config that the node was given
    says that this run is resumed. The node's floors are held against what is returned.

    Raises:
        ConfigError: The run is resumed, and the message does not say what it was.
    """
    if not context.run_config.get("resume.from"):
        return context
    try:
        record = message.content.config_records[CONFIG]
        told = json.loads(str(record[ORIGINAL_RUN]))
        run_id, run_config = int(told["run_id"]), dict(told["run_config"])
    except (KeyError, ValueError, TypeError):
        raise ConfigError(
            "resume.from: is set, and the server does not say which run is resumed"
        ) from None
    return Context(
        run_id, context.node_id, context.node_config, context.state, run_config
    )
