"""Parse what the owner of a node decides: its data, its partition and its limits."""

import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fedllm.config import LARGEST_DELTA, MOST_TRUSTEES, TRUSTEE_NAME
from fedllm.errors import ConfigError
from fedllm.privacy.agreement import parse_pin

DEFAULT_DELTA = 1e-5
"""Largest delta of a run if the node sets a `max-epsilon` and no delta: at a delta near 1
any epsilon can be reached."""
_LARGEST_EPSILON = 10.0
"""Largest epsilon if the node demands a unit of privacy and sets no `max-epsilon`."""

LIMITS = (
    "privacy-unit",
    "max-epsilon",
    "budget-period",
    "delta",
    "model-name",
    "privacy-noise",
    "person-column",
    "train-plugin",
    "least-trustees",
    "colluding-trustees",
)
KEYS = (
    "data-path",
    "partition-id",
    "num-partitions",
    "declared-rows",
    "declared-persons",
    "trusted-trustees",
    "trustee-name",
    "trustee-key",
    "adapter-rank",
    "max-seconds",
    "max-memory",
    "batch-size",
    *LIMITS,
)

_NOISES = ("local", "joint")
_MOST_ROWS = 2**31


@dataclass(frozen=True)
class NodeConfig:
    """The config of a node, set by its owner or, in a simulation, by Flower.

    Attributes:
        partition_id: Which partition the client has. It seeds the training and names the
            client's log.
        num_partitions: Partitions of `data.name`; 1 if the client has a file of its own, 0
            if the node has no data and is a trustee alone.
        data_path: The client's own file or folder; None: a partition of `data.name`.
        privacy_unit: The `privacy.unit` that a run must have; None: any.
        max_epsilon: Largest epsilon that all runs of a period may spend together; None: no
            limit.
        budget_period: Days of a period, which the owner alone renews, under client level;
            None: `max_epsilon` is for the lifetime.
        delta: Largest `privacy.delta` of a run; None: not set.
        model_name: The `model.name` that a run must have, and so the chat template that
            the node's rows are put in; None: any, but under record level with another
            limit the built-in one.
        privacy_noise: `joint` if a run may leave the noise of record level to the server;
            `local` or None: a node with a limit adds it itself.
        declared_rows: How many rows the node's owner declares as public; None: not set.
        person_column: The `data.person-column` that a run of record level must have, which
            the owner's file names persons by; None: a run must have none.
        declared_persons: How many persons the owner declares as public; set with
            `person_column`.
        train_plugin: The `train.plugin` that a run may have, of a package that the owner
            installed; None: none, if the node runs an app of its owner's choice.
        least_trustees: Fewest trustees of a run, which then has to be sealed; None: any.
        colluding_trustees: How many of them a run must count as the server's; None: any.
        trusted_trustees: Name -> public identity key of the trustees that the owner knows,
            in order; empty: the node takes part in no sealed run.
        adapter_rank: Largest rank that the node trains, of a run's adapter whose ranks are
            nested; None: the run's.
        max_seconds: Seconds that a round may take of this machine; None: the run's
            `strategy.round-timeout` alone.
        max_memory: GiB that a training may need, by an estimate; None: any.
        batch_size: Largest micro-batch; None: the run's.
        trustee_name: Its own name, if it is a trustee; set with `trustee_key`.
        trustee_key: File of its identity key.
        is_partition: Whether the config names a number of partitions, as every node of a
            simulation does. What such a client prints may reach the server's log.
    """

    partition_id: int
    num_partitions: int
    data_path: str | None = None
    privacy_unit: str | None = None
    max_epsilon: float | None = None
    budget_period: float | None = None
    delta: float | None = None
    model_name: str | None = None
    privacy_noise: str | None = None
    declared_rows: int | None = None
    person_column: str | None = None
    declared_persons: int | None = None
    train_plugin: str | None = None
    least_trustees: int | None = None
    colluding_trustees: int | None = None
    trusted_trustees: tuple[tuple[str, str], ...] = ()
    adapter_rank: int | None = None
    max_seconds: float | None = None
    max_memory: float | None = None
    batch_size: int | None = None
    trustee_name: str | None = None
    trustee_key: str | None = None
    is_partition: bool = False

    @property
    def counted_delta(self) -> float:
        """Delta that the node's runs are composed at."""
        # No run's own delta is larger, so a run that keeps its promise fits.
        return min(DEFAULT_DELTA if self.delta is None else self.delta, LARGEST_DELTA)

    @property
    def has_data(self) -> bool:
        """Whether the node can be a client; else it is a trustee alone."""
        return self.num_partitions > 0

    @property
    def is_simulated(self) -> bool:
        """Whether no owner stands behind this node: neither a file nor a limit is set.

        A simulated client starts a new ledger in every run, which would be wrong for a
        real one: the owner of a SuperNode without a file of its own sets a limit.
        """
        return (
            self.data_path is None
            and not self.has_limits
            and not self.trusted_trustees
            and self.trustee_name is None
        )

    @property
    def has_limits(self) -> bool:
        """Whether the node's owner limits what a run may be."""
        limits = (
            *(self.privacy_unit, self.max_epsilon, self.delta, self.model_name),
            *(self.least_trustees, self.colluding_trustees),
        )
        return any(value is not None for value in limits)


def parse_node_config(values: Mapping[str, Any]) -> NodeConfig:
    """Parse the node config that Flower hands a client.

    Args:
        values: Flower's mapping. A simulation sets `partition-id` and `num-partitions`;
            a SuperNode has what its owner typed after `--node-config`.

    Raises:
        ConfigError: A key is unknown, a number is none, or there is neither a file nor a
            partition.
    """
    _require_known_keys(values)
    partition_id, num_partitions = _partition(values)
    path, unit = values.get("data-path"), values.get("privacy-unit")
    model_name, plugin = values.get("model-name"), values.get("train-plugin")
    max_epsilon = _number(values, "max-epsilon")
    if max_epsilon is None and unit in ("client", "record"):
        # A unit of privacy without a bound would take any epsilon.
        max_epsilon = _LARGEST_EPSILON
    return NodeConfig(
        partition_id=partition_id,
        num_partitions=num_partitions,
        data_path=None if path is None else str(path),
        privacy_unit=None if unit is None else str(unit),
        max_epsilon=max_epsilon,
        budget_period=_budget_period(values, max_epsilon),
        delta=_number(values, "delta"),
        model_name=None if model_name is None else str(model_name),
        privacy_noise=_noise(values),
        declared_rows=_declared_number(values, "declared-rows", "rows"),
        person_column=_person_column(values),
        declared_persons=_declared_number(values, "declared-persons", "persons"),
        train_plugin=None if plugin is None else str(plugin),
        least_trustees=_declared_number(values, "least-trustees", "trustees"),
        colluding_trustees=_colluding(values),
        trusted_trustees=_pins(values),
        adapter_rank=_declared_number(values, "adapter-rank", "columns"),
        max_seconds=_positive(values, "max-seconds"),
        max_memory=_positive(values, "max-memory"),
        batch_size=_declared_number(values, "batch-size", "examples"),
        trustee_name=_trustee(values)[0],
        trustee_key=_trustee(values)[1],
        is_partition="num-partitions" in values,
    )


def log_number(values: Mapping[str, Any]) -> int:
    """Return the number in the name of a client's log, also for a wrong node config.

    Returns:
        The partition id; 0 if it cannot be read.
    """
    try:
        return _partition(values)[0]
    except ConfigError:
        return 0


def _noise(values: Mapping[str, Any]) -> str | None:
    """Return `privacy-noise`; None if it is not set.

    Raises:
        ConfigError: It is neither `local` nor `joint`, or no unit of privacy stands by it.
    """
    noise = values.get("privacy-noise")
    if noise is None:
        return None
    if noise not in _NOISES:
        raise ConfigError(
            f"node config: privacy-noise: must be 'local' or 'joint' (got {noise!r})"
        )
    if values.get("privacy-unit") != "record":
        raise ConfigError(
            "node config: privacy-noise: is for privacy-unit='record' (got "
            f"{values.get('privacy-unit')!r})"
        )
    return str(noise)


def _person_column(values: Mapping[str, Any]) -> str | None:
    """Return `person-column`; None if it is not set.

    Raises:
        ConfigError: It names nothing, or what belongs to it is missing.
    """
    column = values.get("person-column")
    if column is None:
        if "declared-persons" in values:
            raise ConfigError(
                "node config: declared-persons: needs person-column, the column that "
                "names whose row it is"
            )
        return None
    if not isinstance(column, str) or not column:
        raise ConfigError(
            f"node config: person-column: must name a column (got {column!r})"
        )
    if values.get("privacy-unit") != "record":
        raise ConfigError(
            "node config: person-column: is for privacy-unit='record' (got "
            f"{values.get('privacy-unit')!r})"
        )
    for key, why in (
        ("data-path", "a file of the node's own, whose persons its owner knows"),
        ("declared-persons", "how many persons the file has, as a public number"),
    ):
        if key not in values:
            raise ConfigError(f"node config: person-column: needs {key}, {why}")
    return column


def _pins(values: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    """Return the trustees that the owner knows: name:PIN, separated by commas.

    Raises:
        ConfigError: One is no name and pin, or a name or a pin stands twice.
    """
    text = values.get("trusted-trustees")
    if text is None:
        return ()
    pins: dict[str, str] = {}
    for part in str(text).split(","):
        name, _, pin = part.strip().partition(":")
        if not TRUSTEE_NAME.fullmatch(name) or name in pins or pin in pins.values():
            raise ConfigError(
                "node config: trusted-trustees: must be name:KEY,name:KEY with each name and "
                f"each key once (got {part.strip()!r})"
            )
        parse_pin(pin)
        pins[name] = pin
    return tuple(pins.items())


def _trustee(values: Mapping[str, Any]) -> tuple[str | None, str | None]:
    """Return name and key file of a node that is a trustee; None if it is none.

    Raises:
        ConfigError: One is set without the other, or the name is none.
    """
    name, key = values.get("trustee-name"), values.get("trustee-key")
    if (name is None) != (key is None):
        raise ConfigError(
            "node config: trustee-name and trustee-key: a trustee has both (got "
            f"{'the name' if key is None else 'the key'} alone)"
        )
    if name is None:
        return None, None
    if not TRUSTEE_NAME.fullmatch(str(name)):
        raise ConfigError(
            "node config: trustee-name: has small letters, digits, dots and dashes (got "
            f"{name!r})"
        )
    return str(name), str(key)


def _colluding(values: Mapping[str, Any]) -> int | None:
    """Return how many trustees a run must count as the server's; None if it is not set.

    Raises:
        ConfigError: It is no number of trustees.
    """
    number = _number(values, "colluding-trustees")
    if number is None:
        return None
    if number != int(number) or not 0 <= number < MOST_TRUSTEES:
        raise ConfigError(
            "node config: colluding-trustees: must be a whole number from 0 to "
            f"{MOST_TRUSTEES - 1} (got {values['colluding-trustees']!r})"
        )
    return int(number)


def _declared_number(values: Mapping[str, Any], key: str, what: str) -> int | None:
    """Return how many of something the owner declares or allows; None if it is not set.

    Raises:
        ConfigError: It is no whole number of them.
    """
    number = _number(values, key)
    if number is None:
        return None
    if number != int(number) or not 0 < number <= _MOST_ROWS:
        raise ConfigError(
            f"node config: {key}: must be a whole number of {what}, at least 1 (got "
            f"{values[key]!r})"
        )
    return int(number)


def _require_known_keys(values: Mapping[str, Any]) -> None:
    """Check that every key is read: an owner would rely on a limit that is misspelled.

    Raises:
        ConfigError: Names the keys that nothing reads.
    """
    unknown = [key for key in values if key not in KEYS]
    if unknown:
        raise ConfigError(
            f"node config: {', '.join(unknown)}: unknown; the keys are {', '.join(KEYS)}"
        )


def _partition(values: Mapping[str, Any]) -> tuple[int, int]:
    """Return the partition id and the number of partitions.

    A client with a file of its own has one partition. Its id, which only seeds the
    training, comes from the file's path, since Flower's node ids are random.
    """
    partition_id = _number(values, "partition-id")
    if "data-path" in values:
        path = str(values["data-path"]).encode("utf-8", "backslashreplace")
        return (zlib.crc32(path) if partition_id is None else int(partition_id)), 1
    if "trustee-name" in values and "num-partitions" not in values:
        _require_nothing_of_data(values)
        return zlib.crc32(str(values["trustee-name"]).encode()), 0
    num_partitions = _number(values, "num-partitions")
    if partition_id is None or num_partitions is None:
        raise ConfigError(
            "node config: needs data-path, the client's own data file, or partition-id "
            "and num-partitions: flower-supernode --node-config 'data-path=\"...\"'"
        )
    if num_partitions < 1:
        raise ConfigError(
            f"node config: num-partitions: must be at least 1 (got {num_partitions:g})"
        )
    return int(partition_id), int(num_partitions)


def _require_nothing_of_data(values: Mapping[str, Any]) -> None:
    """Check that the config of a trustee without data says nothing of data.

    Raises:
        ConfigError: It does: its owner forgot where the data is.
    """
    for key in ("partition-id", "declared-rows", "declared-persons", "person-column"):
        if key in values:
            raise ConfigError(
                f"node config: {key}: needs data-path; a trustee without data has neither, "
                "and never trains"
            )


def _budget_period(
    values: Mapping[str, Any], max_epsilon: float | None
) -> float | None:
    """Return the days of a period, None if it is not set.

    Raises:
        ConfigError: It is not above 0, or there is nothing that it could renew.
    """
    days = _number(values, "budget-period")
    if days is None:
        return None
    if days <= 0:
        raise ConfigError(f"node config: budget-period: must be above 0 (got {days:g})")
    if max_epsilon is None or values.get("privacy-unit") == "record":
        raise ConfigError(
            "node config: budget-period: needs max-epsilon under client level; under "
            "privacy-unit='record' max-epsilon is for all runs"
        )
    return days


def _positive(values: Mapping[str, Any], key: str) -> float | None:
    """Return a number above 0, None if it is not set.

    Raises:
        ConfigError: It is something else.
    """
    number = _number(values, key)
    if number is not None and number <= 0:
        raise ConfigError(f"node config: {key}: must be above 0 (got {number:g})")
    return number


def _number(values: Mapping[str, Any], key: str) -> float | None:
    """Return a number of the node config, None if it is not set.

    Raises:
        ConfigError: It is set to something else.
    """
    value = values.get(key)
    if value is None:
        return None
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise ConfigError(f"node config: {key}: must be a number (got {value!r})")
    return number
