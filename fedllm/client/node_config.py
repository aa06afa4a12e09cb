"""The node's own config: its data, its partition, and its limits on any run."""

import math
import zlib
from collections.abc import Mapping
from typing import Any

from flwr.app import Context

from fedllm.config import RunConfig
from fedllm.errors import ConfigError

_LARGEST_DELTA = 1e-5
"""Where a node says nothing else: any epsilon can be had at a delta near 1."""

LIMITS = ("privacy-unit", "max-epsilon", "delta")
_FLOOR_WORDS = ("privacy", "epsilon", "delta")


def check_node_limits(node_config: Mapping[str, Any], config: RunConfig) -> None:
    """Hold a run against the floors in this node's own config.

    Raises:
        ConfigError: The run promises less than the node's owner demands.
    """
    privacy = config.privacy
    _require_known_floors(node_config)
    unit = node_config.get("privacy-unit")
    limit = number_setting(node_config, "max-epsilon")
    delta = number_setting(node_config, "delta")
    if limit is not None or delta is not None:
        # An epsilon or delta of no guarantee at all is below every floor.
        unit = unit or "client"
    if unit is not None and unit != privacy.unit:
        raise ConfigError(
            f"privacy.unit: this node demands {unit!r} (got {privacy.unit!r})"
            + ("" if "privacy-unit" in node_config else "; its privacy-unit is not set")
        )
    promised = [e for e in (privacy.target_epsilon, privacy.max_epsilon) if e > 0]
    if limit is not None and delta is None and privacy.delta > _LARGEST_DELTA:
        raise ConfigError(
            f"privacy.delta: this node's max-epsilon is meant at {_LARGEST_DELTA:g} "
            f"or less, where it sets no delta (got {privacy.delta})"
        )
    if privacy.unit == "record":
        # This client's own ledger holds the limit, whatever the run promises.
        limit = None
    if limit is not None and (not promised or min(promised) > limit):
        raise ConfigError(
            f"privacy.target-epsilon: this node demands at most {limit} "
            f"(got {min(promised) if promised else 'no bound'})"
        )
    if delta is not None and not 0 < privacy.delta <= delta:
        raise ConfigError(
            f"privacy.delta: this node demands a set value of at most {delta} "
            f"(got {privacy.delta})"
        )


def _require_known_floors(node_config: Mapping[str, Any]) -> None:
    """Refuse a floor by a name that nothing reads: its owner would rely on it.

    Raises:
        ConfigError: There is one.
    """
    for key in node_config:
        if key not in LIMITS and any(w in key.lower() for w in _FLOOR_WORDS):
            raise ConfigError(
                f"node config: {key}: is no floor; those are {', '.join(LIMITS)}"
            )


def partition_of(context: Context) -> tuple[int, int]:
    """Return (partition id, number of partitions) as the node reports them.

    A SuperNode with a file of its own has one partition; its id, which only seeds the
    training, comes from the file's path, since Flower's node ids are random.
    """
    node = context.node_config
    partition_id = number_setting(node, "partition-id")
    if "data-path" in node:
        path = str(node["data-path"]).encode("utf-8", "backslashreplace")
        return (zlib.crc32(path) if partition_id is None else int(partition_id)), 1
    num_partitions = number_setting(node, "num-partitions")
    if partition_id is None or num_partitions is None:
        raise ConfigError(
            "node config: needs data-path, the client's own data file, or partition-id "
            "and num-partitions: flower-supernode --node-config 'data-path=\"...\"'"
        )
    return int(partition_id), int(num_partitions)


def number_setting(node_config: Mapping[str, Any], key: str) -> float | None:
    """Return a number of the node config, None where it is not set.

    Raises:
        ConfigError: It is set to something else.
    """
    value = node_config.get(key)
    if value is None:
        return None
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise ConfigError(f"node config: {key}: must be a number (got {value!r})")
    return number
