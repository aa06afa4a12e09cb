"""Runs killed with -9 at random moments and resumed, for as long as is asked.

    python -m tests.soak --minutes 30 --seed 1

Each run is the server's real loop in a process of its own, with clients that answer at
once, with and without differential privacy in turn. It is killed up to four times, resumed
each time under other node ids, and then let finish. After every kill and at the end: the
ledger is whole and never forgets a round, epsilon never shrinks and never passes what was
promised, metrics.jsonl has each round once, and without privacy the end is that of a run
that nobody killed, to the last bit.
"""

import argparse
import json
import logging
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

from fedllm.evaluation.public_rows import PublicRows
from fedllm.privacy.ledger import Ledger
from fedllm.runs.checkpoint import CHECKPOINT_FILE
from tests.helpers.federations import NO_PRIVACY, federation, kept, resumed
from tests.helpers.rows import write_rows
from tests.helpers.tiny_models import save_llama

_ROUNDS = 6
_MOST_KILLS = 4


def run(given: dict[str, Any], node: int) -> None:
    """Run, or go on with what is there; the work of one process."""
    logging.disable(logging.CRITICAL)
    run = federation(given) if node == 0 else resumed(first_node=100 + 10 * node)
    run.run()


def started(given: dict[str, Any], node: int) -> BaseProcess:
    # A fork has everything imported, so that kills fall on the run and not on imports.
    process = multiprocessing.get_context("fork").Process(
        target=run, args=(given, node)
    )
    process.start()
    return process


class Soak:
    """One long test.

    Args:
        home: Where runs are kept.
        given: Settings of all runs.
        seed: When runs are killed.
    """

    def __init__(self, home: Path, given: dict[str, Any], seed: int) -> None:
        self.home = home
        self.given = given
        self.random = random.Random(seed)
        self.counts: Counter[str] = Counter()
        self.expected: Any = None
        self.seconds = 1.0

    def one_run(self, private: bool) -> None:
        given = {**self.given, **({} if private else NO_PRIVACY)}
        kills = self.random.randint(0, _MOST_KILLS) if self.expected else 0
        node, releases = 0, list[int]()
        while True:
            began = time.monotonic()
            process = started(given, node)
            if kills:
                process.join(self.random.uniform(0, self.seconds))
                if process.is_alive():
                    os.kill(process.pid or 0, signal.SIGKILL)
                    self.counts["kills"] += 1
                kills -= 1
            process.join()
            if process.exitcode == 0:
                break
            if process.exitcode != -signal.SIGKILL:
                raise AssertionError(f"a run failed: exit status {process.exitcode}")
            releases = self.check(private, releases)
            folder = self.folder
            if folder is None or not (folder / CHECKPOINT_FILE).exists():
                # Nothing was trained and nothing spent: it is begun again.
                self.forget()
                node, releases = 0, []
                continue
            if (folder / "result.json").exists():
                break
            node += 1
        if node == 0 and not kills:
            self.seconds = max(self.seconds, time.monotonic() - began)
        self.check(private, releases)
        self.finish(private)

    @property
    def folder(self) -> Path | None:
        found = [p for p in (self.home / "runs").glob("2*") if p.is_dir()]
        assert len(found) <= 1, found
        return found[0] if found else None

    def check(self, private: bool, before: list[int]) -> list[int]:
        """Look at what lies on the disk; return the rounds that are paid for."""
        folder = self.folder
        if folder is None or not (folder / "privacy.json").exists():
            return before
        metrics = folder / "metrics.jsonl"
        if metrics.exists():
            # Killed within an append, the last line may be cut: resuming drops it.
            whole = metrics.read_text().split("\n")[:-1]
            rounds = [json.loads(line)["server_round"] for line in whole]
            assert len(set(rounds)) == len(rounds), rounds
        if not private:
            return before
        ledger = Ledger.load(folder / "privacy.json")
        assert ledger.releases[: len(before)] == before, (before, ledger.releases)
        assert (ledger.epsilons().zero_out or 0) <= 8.0 + 1e-6
        return ledger.releases

    def finish(self, private: bool) -> None:
        """Hold a finished run against one that nobody killed, and remove it."""
        folder = self.folder
        assert folder is not None
        result = json.loads((folder / "result.json").read_text())
        if private:
            ledger = Ledger.load(folder / "privacy.json")
            self.counts["rounds paid for"] += len(ledger.releases)
            self.counts["rounds lost"] += len(ledger.releases) - len(
                [line for line in (folder / "metrics.jsonl").open()][1:]
            )
        else:
            end = kept(folder)
            self.expected = self.expected or end
            assert end == self.expected
        self.counts["rounds finished"] += result["num_rounds"]
        self.counts["private runs" if private else "runs without privacy"] += 1
        self.forget()

    def forget(self) -> None:
        shutil.rmtree(self.home / "runs", ignore_errors=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        soak = make_soak(Path(name), args.seed, patch)
        told, first = 0.0, 0.0
        while time.monotonic() - began < 60 * args.minutes:
            soak.one_run(private=False)
            soak.one_run(private=True)
            first = first or megabytes()
            if time.monotonic() - told > 60:
                told = time.monotonic()
                sys.stderr.write(f"{(told - began) / 60:.0f} min: {soak.counts}\n")
    minutes = (time.monotonic() - began) / 60
    counted = ", ".join(f"{n:,} {what}" for what, n in sorted(soak.counts.items()))
    sys.stdout.write(
        f"{minutes:.0f} minutes: {counted}; nothing lost; memory of a run at its peak "
        f"{megabytes():.0f} MB ({first:.0f} after the first two)\n"
    )


def make_soak(folder: Path, seed: int, patch: pytest.MonkeyPatch) -> Soak:
    """Make a soak over the tiny model, with a made-up loss."""

    def loss(self: PublicRows, arrays: Any) -> float:
        total = sum(float(abs(value).sum()) for value in arrays.values())
        return abs(total % 7 - 3.5) + 1.0

    patch.setattr(PublicRows, "validation_loss", loss)
    patch.setattr(PublicRows, "test_loss", lambda self, arrays: None)
    patch.setattr("fedllm.reporting.monitor.write_report", lambda folder: None)
    patch.setenv("FEDLLM_HOME", str(folder / "home"))
    model = folder / "model"
    model.mkdir()
    save_llama(model)
    given = {
        "model.name": str(model),
        "model.quantization": 0,
        "data.name": write_rows(folder / "train.jsonl", 24),
        "data.public-validation": write_rows(folder / "validation.jsonl", 6, 100),
        "data.public-test": write_rows(folder / "test.jsonl", 5, 200),
        "adapter.rank": 4,
        "num-server-rounds": _ROUNDS,
        "strategy.server-optimizer": "adam",
        "strategy.server-learning-rate": 0.05,
        "strategy.server-learning-rate-min": 0.01,
        "strategy.wait-for-clients": 0.1,
        "privacy.noise-probe": False,
    }
    return Soak(folder / "home", given, seed)


def megabytes() -> float:
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024


if __name__ == "__main__":
    main()
