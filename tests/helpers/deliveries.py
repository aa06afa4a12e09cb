"""A node to which a run has delivered its adapter."""

from pathlib import Path
from typing import Any

from fedllm.adapters.peft_model import initial_arrays
from fedllm.adapters.resolve import adapter_spec
from fedllm.client.delivery import Delivery, deliveries
from fedllm.client.message_handler import reply_to
from fedllm.config_parsing import parse_run_config
from fedllm.models.location import load_config
from fedllm.wire.messages import DELIVER
from tests.helpers.flower_messages import context, train_instruction


def deliver_to(model: Path, node: dict[str, Any], **changes: Any) -> Delivery:
    """Bring a node the untuned adapter of run 1.

    Args:
        model: Folder of the base.
        node: The node's config.
        changes: Settings of the run, with `_` for the first dot.
    """
    settings = {
        "model.name": str(model),
        "model.quantization": 0,
        "data.name": "wordnet-medical",
        "adapter.rank": 2,
        "train.batch-size": 2,
        "personal.epochs": 1.0,
        "personal.learning-rate": 0.02,
        **{key.replace("_", ".", 1): value for key, value in changes.items()},
    }
    config = parse_run_config(settings)
    spec = adapter_spec(config.adapter, load_config(str(model)), config.seed)
    message = train_instruction(initial_arrays(spec), message_type=DELIVER)
    reply_to(message, context(settings, node))
    return deliveries()[-1]
