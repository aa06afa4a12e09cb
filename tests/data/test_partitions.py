"""Shares of the rows: disjoint, complete, and the same in every process."""

import hashlib
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from fedllm.config import DataConfig
from fedllm.data.columns import LINE
from fedllm.data.partitions import partition
from fedllm.data.rows import load_rows
from fedllm.errors import ConfigError, DataError
from tests.helpers.rows import EMBEDDED, ROOT, ROWS, write_jsonl

# Sharing


def ids_of(config: DataConfig, num_partitions: int, seed: int = 42) -> list[list[str]]:
    rows = load_rows(config)
    parts = [
        partition(config, rows, i, num_partitions, seed) for i in range(num_partitions)
    ]
    return [part["id"][:] for part in parts]


KINDS = {"iid": 20, "dirichlet": 20, "size-skew": 20, "natural": 30}


@pytest.mark.parametrize("kind", KINDS)
def test_partitions_are_disjoint_and_hold_every_row(kind: Any) -> None:
    config = DataConfig(partition=kind)
    parts = ids_of(config, KINDS[kind])
    held = [row for part in parts for row in part]
    assert len(held) == len(set(held)) == 4863
    assert set(held) == set(load_rows(config)["id"])


@pytest.mark.parametrize("kind", ["iid", "dirichlet", "size-skew"])
def test_the_seed_decides_who_holds_which_row(kind: Any) -> None:
    config = DataConfig(partition=kind)
    assert ids_of(config, 5) == ids_of(config, 5)
    assert ids_of(config, 5) != ids_of(config, 5, seed=43)


def test_iid_partitions_are_of_one_size_and_not_in_the_files_order() -> None:
    config = DataConfig(partition="iid")
    parts = ids_of(config, 20)
    assert {len(part) for part in parts} == {243, 244}
    assert parts[0] != load_rows(config)["id"][: len(parts[0])]
    site = dict(zip(load_rows(config)["id"], load_rows(config)["site"], strict=True))
    assert min(len({site[row] for row in part}) for part in parts) > 5


def test_size_skew_grows_in_proportion() -> None:
    sizes = [len(part) for part in ids_of(DataConfig(partition="size-skew"), 20)]
    unit = 4863 / 210
    assert all(abs(size - unit * k) <= 1 for k, size in enumerate(sizes, start=1))


def test_natural_gives_each_client_one_site() -> None:
    config = DataConfig(partition="natural")
    rows = load_rows(config)
    sites = [set(partition(config, rows, i, 11, 42)["site"]) for i in range(11)]
    assert all(len(site) == 1 for site in sites)
    assert len(set.union(*sites)) == 11


def test_a_smaller_alpha_makes_clients_more_one_sided() -> None:
    def one_sidedness(alpha: float) -> float:
        config = DataConfig(partition="dirichlet", partition_alpha=alpha)
        rows = load_rows(config)
        shares = []
        for i in range(10):
            sites = partition(config, rows, i, 10, 42)["site"][:]
            if sites:
                shares.append(max(sites.count(s) for s in set(sites)) / len(sites))
        return sum(shares) / len(shares)

    assert one_sidedness(0.05) > one_sidedness(100.0) + 0.2


def test_a_small_alpha_may_leave_a_client_without_a_row() -> None:
    config = DataConfig(partition="dirichlet", partition_alpha=0.01)
    sizes = [len(part) for part in ids_of(config, 40)]
    assert min(sizes) == 0
    assert sum(sizes) == 4863


def test_natural_needs_at_least_as_many_clients_as_there_are_groups() -> None:
    config = DataConfig(partition="natural")
    with pytest.raises(ConfigError, match=r"each of the 11 values.*\(got 10 clients\)"):
        partition(config, load_rows(config), 0, 10, 42)


def test_natural_cuts_the_largest_sites_for_more_clients() -> None:
    config = DataConfig(partition="natural")
    rows = load_rows(config)
    parts = [partition(config, rows, i, 40, 42) for i in range(40)]
    sizes = [len(part) for part in parts]
    assert all(len(set(part["site"])) == 1 for part in parts)
    assert sorted(row for part in parts for row in part["id"]) == sorted(rows["id"])
    smallest_site = min(Counter(rows["site"]).values())
    assert max(sizes) <= 2 * max(smallest_site, min(sizes))


@pytest.mark.parametrize("kind", ["natural", "dirichlet"])
def test_a_column_to_go_by_that_is_not_there_is_named(kind: Any) -> None:
    config = DataConfig(partition=kind, partition_column="hospital")
    with pytest.raises(DataError, match=r"no column 'hospital'; .* id, site, term"):
        partition(config, load_rows(config), 0, 11, 42)


def test_a_row_without_a_group_is_named(tmp_path: Path) -> None:
    rows = [{**ROWS[0], "site": "a"}, ROWS[1]]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    config = DataConfig(name=str(path), partition="natural")
    with pytest.raises(DataError, match=r"\(got None in row 2\)"):
        partition(config, load_rows(config), 0, 1, 42)


def test_a_partition_that_does_not_exist_raises_an_error() -> None:
    config = DataConfig()
    with pytest.raises(ConfigError, match=r"must be in \[0, 5\) \(got 5\)"):
        partition(config, load_rows(config), 5, 5, 42)


@pytest.mark.parametrize("kind", ["iid", "dirichlet", "size-skew"])
def test_more_clients_than_rows_leaves_some_without_a_row(
    tmp_path: Path, kind: Any
) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [{**row, "site": "a"} for row in ROWS])
    config = DataConfig(name=str(path), partition=kind)
    rows = load_rows(config)
    parts = [partition(config, rows, i, 5, 42)[LINE][:] for i in range(5)]
    lines = sorted(line for part in parts for line in part)
    assert lines == ["line 1", "line 2", "line 3"]
    assert parts.count([]) >= 2


PROBE = """
import sys
from fedllm.config import DataConfig
from fedllm.data.partitions import partition
from fedllm.data.rows import load_rows
slow = {"datasets", "flwr_datasets", "torch", "transformers", "trl"}
assert not slow & set(sys.modules), slow & set(sys.modules)
import hashlib
for kind, count in (("iid", 7), ("dirichlet", 7), ("size-skew", 7), ("natural", 11)):
    config = DataConfig(name=sys.argv[1], partition=kind)
    part = partition(config, load_rows(config), 3, count, 42)
    print(kind, hashlib.sha256("".join(part["instruction"]).encode()).hexdigest())
"""


def test_another_process_gets_the_same_rows_prints_nothing_and_leaves_no_file(
    tmp_path: Path,
) -> None:
    home = tmp_path / "home"
    home.mkdir()
    path = tmp_path / "rows.jsonl"
    shards = sorted(EMBEDDED.glob("train-*.jsonl"))
    path.write_bytes(b"".join(shard.read_bytes() for shard in shards))
    paths = {"HOME": home, "HF_HOME": home / "hf", "FEDLLM_HOME": home / "fedllm"}
    env = {**os.environ, **{k: str(v) for k, v in paths.items()}, "PYTHONHASHSEED": "7"}
    # Matplotlib, which flwr_datasets imports, writes its font list on first use.
    env["MPLCONFIGDIR"] = str(tmp_path / "matplotlib")
    command = [sys.executable, "-c", PROBE, str(path)]
    done = subprocess.run(
        command, env=env, cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    mine = []
    for kind, count in (*((k, 7) for k in list(KINDS)[:3]), ("natural", 11)):
        config = DataConfig(partition=kind)  # type: ignore[arg-type]
        ids = partition(config, load_rows(config), 3, count, 42)["instruction"]
        mine.append(f"{kind} {hashlib.sha256(''.join(ids).encode()).hexdigest()}")
    assert done.stdout.split("\n")[:-1] == mine
    assert done.stderr in (
        "",
        "Matplotlib is building the font cache; this may take a moment.\n",
    )
    assert [file for file in home.rglob("*") if file.is_file()] == []


@pytest.mark.parametrize("kind", ["iid", "size-skew", "natural", "dirichlet"])
def test_a_person_is_whole_in_one_partition(kind: Any) -> None:
    """Also if the ids of one person are written in two ways."""
    from datasets import Dataset

    rows = Dataset.from_list(
        [
            {
                "n": n,
                "who": f"{'  ' * (n % 2)}p{n % 13}" if n % 7 else " ",
                "site": n % 3,
            }
            for n in range(140)
        ]
    )
    config = DataConfig(partition=kind, person_column="who")

    parts = [partition(config, rows, i, 4, 3) for i in range(4)]

    assert sorted(n for part in parts for n in part["n"][:]) == list(range(140))
    held = [{who.strip() for who in part["who"][:]} - {""} for part in parts]
    assert sum(map(len, held)) == len(set().union(*held)) == 13
    assert sum(bool(persons) for persons in held) > 1
    assert parts[0].column_names == rows.column_names


def test_a_person_column_that_is_missing_is_one_error() -> None:
    config = DataConfig(person_column="patient")
    with pytest.raises(DataError, match="data.person-column: there is no column 'pat"):
        partition(config, load_rows(config), 0, 5, 1)
