"""Partitions of one data set among virtual clients."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from fedllm.config import DataConfig
from fedllm.data.persons import by_person
from fedllm.data.readers import comma_list
from fedllm.errors import ConfigError, DataError

if TYPE_CHECKING:
    from datasets import Dataset
    from flwr_datasets.partitioner import Partitioner


def partition(
    config: DataConfig,
    rows: "Dataset",
    partition_id: int,
    num_partitions: int,
    seed: int,
) -> "Dataset":
    """Return the rows of one virtual client, by one of flwr-datasets' partitioners.

    The partitions are disjoint and together hold every row; the same arguments give
    the same rows in every process. With `person_column` all rows of a person are in one
    partition: persons are shared out as rows are otherwise, each by its first row's label,
    and a row without an id by itself. A partition may be empty: under `dirichlet` with a
    small alpha, under `size-skew` with few rows, and if there are fewer rows than clients
    (then each row is one client's). `natural` with more clients than groups
    cuts the larger groups into several clients.

    Args:
        config: Names the kind of partition and its column.
        rows: All rows.
        partition_id: In [0, num_partitions).
        num_partitions: Number of virtual clients.
        seed: The run's seed.

    Raises:
        ConfigError: No such partition, or `natural` has fewer clients than groups.
        DataError: The partition column is missing, or has rows without a value; or the
            person column is missing.
    """
    if config.person_column:
        return _whole_persons(config, rows, partition_id, num_partitions, seed)
    if not 0 <= partition_id < num_partitions:
        raise ConfigError(
            f"partition-id: must be in [0, {num_partitions}) (got {partition_id})"
        )
    if config.partition in ("dirichlet", "natural"):
        _check_groups(config, rows, num_partitions)
    if config.partition in ("iid", "size-skew", "natural"):
        # These partitioners cut contiguous pieces: the shuffle makes them random.
        rows = rows.shuffle(seed=seed)
    if len(rows) < num_partitions:
        return rows.select([partition_id] if partition_id < len(rows) else [])
    if config.partition == "natural":
        groups = rows[config.partition_column][:]
        return rows.select(_parts_of_groups(groups, num_partitions)[partition_id])
    partitioner = _make_partitioner(config, len(rows), num_partitions, seed)
    partitioner.dataset = rows
    return partitioner.load_partition(partition_id)


def _whole_persons(
    config: DataConfig,
    rows: "Dataset",
    partition_id: int,
    num_partitions: int,
    seed: int,
) -> "Dataset":
    """Return all rows of the persons that `partition` gives to one virtual client.

    Raises:
        ConfigError: As `partition`.
        DataError: As `partition`.
    """
    from datasets import Dataset

    column = config.person_column
    if column not in rows.column_names:
        raise DataError(
            f"data.person-column: there is no column {column!r}; the columns are "
            f"{comma_list(rows.column_names)}"
        )
    persons = by_person(rows[column][:])
    places = [*persons.places, *([place] for place in persons.without_id)]
    label = config.partition_column
    number = f"{label}: number"
    columns: dict[str, list[Any]] = {number: list(range(len(places)))}
    if config.partition in ("dirichlet", "natural"):
        _check_groups(config, rows, num_partitions)
        labels = rows[label][:]
        columns[label] = [labels[first] for first, *_ in places]
    shares = Dataset.from_dict(columns)
    by_row = replace(config, person_column="")
    chosen = partition(by_row, shares, partition_id, num_partitions, seed)
    return rows.select([place for unit in chosen[number][:] for place in places[unit]])


def _make_partitioner(
    config: DataConfig, num_rows: int, num_partitions: int, seed: int
) -> "Partitioner":
    """Return Flower's partitioner for this kind of partition."""
    from flwr_datasets import partitioner as flower

    if config.partition == "dirichlet":
        # With a minimum size it would draw again up to ten times and then fail.
        return flower.DirichletPartitioner(
            num_partitions,
            config.partition_column,
            config.partition_alpha,
            min_partition_size=0,
            seed=seed,
        )
    if config.partition == "size-skew":
        # LinearPartitioner means the same but raises for a client without a row.
        return flower.SizePartitioner(_linear_sizes(num_rows, num_partitions))
    return flower.IidPartitioner(num_partitions)


def _parts_of_groups(
    groups: Sequence[str | int], num_partitions: int
) -> list[list[int]]:
    """Return parts of one group each; the largest are cut until there are enough.

    Args:
        groups: The group of each row.
        num_partitions: Number of parts, at least that of the groups.

    Returns:
        Row numbers of each part, in the order of the groups' names.
    """
    rows: dict[str | int, list[int]] = {}
    for number, group in enumerate(groups):
        rows.setdefault(group, []).append(number)
    parts = dict.fromkeys(rows, 1)
    for _ in range(num_partitions - len(rows)):
        largest = max(sorted(rows, key=str), key=lambda g: len(rows[g]) / parts[g])
        parts[largest] += 1
    return [
        rows[group][part :: parts[group]]
        for group in sorted(rows, key=str)
        for part in range(parts[group])
    ]


def _linear_sizes(num_rows: int, num_partitions: int) -> list[int]:
    """Return sizes in proportion to 1, 2, 3, ... that add up to num_rows."""
    total = num_partitions * (num_partitions + 1) // 2
    ends = [num_rows * k * (k + 1) // 2 // total for k in range(num_partitions + 1)]
    return [end - start for start, end in pairwise(ends)]


def _check_groups(config: DataConfig, rows: "Dataset", num_partitions: int) -> None:
    """Check the partition column of `dirichlet` and `natural`."""
    column = config.partition_column
    if column not in rows.column_names:
        raise DataError(
            f"data.partition-column: there is no column {column!r}; the columns are "
            f"{comma_list(rows.column_names)}"
        )
    values = rows[column][:]
    for number, value in enumerate(values, start=1):
        if not isinstance(value, str | int):
            raise DataError(
                f"data.partition-column: {column!r} must hold text or whole numbers "
                f"(got {value!r:.80} in row {number})"
            )
    groups = len(set(values))
    if config.partition == "natural" and num_partitions < groups:
        raise ConfigError(
            f"data.partition: 'natural' makes at least one client of each of the {groups} "
            f"values of {column!r} (got {num_partitions} clients): add "
            f'--federation-config "num-supernodes={groups}"'
        )
