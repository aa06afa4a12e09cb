"""Node configs as their owners type them."""

from fedllm.client.node_config import NodeConfig, parse_node_config
from tests.helpers.client_replies import NODE

PERSONS = {
    "data_path": "rows.jsonl",
    "privacy_unit": "record",
    "person_column": "patient",
    "declared_persons": 40,
}
"""A node whose rows belong to persons."""


def node_of(**limits: object) -> NodeConfig:
    """Return a node with these limits, by the keys that its owner types."""
    typed = {key.replace("_", "-"): value for key, value in limits.items()}
    return parse_node_config({**NODE, **typed})
