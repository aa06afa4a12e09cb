"""The test bench of an audit: the real strategy, with its inputs and outputs recorded.

All that leaves a round is a function of what enters the server optimiser, which is itself a
check. So the bench puts a recorder before the optimiser of a real ClientLevelDP. Nothing in
the strategy knows of it. To see the sum before the noise, the bench gives the strategy a
generator of zeros; the strategy has no argument for one, so no run can be given one.
"""

import contextlib
import json
import math
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
from flwr.app import ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid

from fedllm.adapters.spec import Arrays
from fedllm.config import RunConfig, WireConfig
from fedllm.privacy.ledger import Ledger, PrivacySettings
from fedllm.privacy.mechanism import Integers, SecureGenerator, Vector
from fedllm.strategy.build import make_strategy
from fedllm.strategy.client_level_dp import ClientLevelDP
from fedllm.strategy.fedavg import AdapterFedAvg
from fedllm.strategy.joint_record_dp import JointRecordDP
from fedllm.strategy.sealed_dp import SealedDP
from fedllm.strategy.sealed_record_dp import SealedRecordDP
from fedllm.strategy.server_optimizer import ServerOptimizer
from fedllm.wire.masking import WIRE, masked
from fedllm.wire.messages import ARRAYS, METRICS, array_record, encoded_record
from fedllm.wire.task_identity import set_task_identity

Contents = Iterable[tuple[int, RecordDict | Error]]

MakeStrategy = Callable[
    [RunConfig, Arrays, list[int], Ledger | None],
    AdapterFedAvg | ClientLevelDP | JointRecordDP | SealedDP | SealedRecordDP,
]

NUM_CLIENTS = 6
"""Clients of a check that does not need more."""

Finding = tuple[bool, str]
"""Whether a check passed, and its result in words."""


class NotAsPromisedError(Exception):
    """The strategy released something other than it promised: the audit fails."""


class ZeroNoise(SecureGenerator):
    """Noise of zero, so that the sum before the noise can be seen; for audits only."""

    def discrete_gaussian(self, size: int) -> Integers:
        """Return (size,) zeros."""
        return np.zeros(size, np.int64)


@dataclass(frozen=True)
class Setup:
    """The settings of an audit.

    Attributes:
        config: The run config.
        settings: The privacy settings that the run promises.
        dimension: d of the toy adapter when noise is measured.
        make: The function that makes the strategy.
    """

    config: RunConfig
    settings: PrivacySettings
    dimension: int
    make: MakeStrategy = make_strategy

    @property
    def promised_noise(self) -> float:
        """The standard deviation of the noise in each value of a released sum."""
        return self.settings.opened_noise * self.settings.clipping_norm

    @contextlib.contextmanager
    def bench(
        self,
        dimension: int,
        num_clients: int = NUM_CLIENTS,
        silent: bool = False,
        config: RunConfig | None = None,
    ) -> "Iterator[Bench]":
        """Yield a bench with a fresh strategy and a ledger of its own."""
        with tempfile.TemporaryDirectory(prefix="fedllm-audit-") as folder:
            yield Bench(
                # Replies are made in the plain encoding, unless a check asks for another.
                config or replace(self.config, wire=WireConfig()),
                self.settings,
                dimension,
                num_clients,
                Path(folder),
                self.make,
                silent,
            )


class Bench:
    """One strategy of `make_strategy`, with the inputs of its server optimiser recorded.

    The release of a round is n times what enters the optimiser, with the n that was
    promised: if the strategy divides by anything else, the release is wrong.

    Args:
        config: The run config.
        settings: The privacy settings that the run promises.
        dimension: d of the toy adapter, at least 8.
        num_clients: N of the toy federation.
        folder: The folder of the ledger; one folder a bench.
        make: The function that makes the strategy.
        silent: Switch the noise off.
    """

    def __init__(
        self,
        config: RunConfig,
        settings: PrivacySettings,
        dimension: int,
        num_clients: int,
        folder: Path,
        make: MakeStrategy = make_strategy,
        silent: bool = False,
    ) -> None:
        set_task_identity()
        self.settings = bench_settings(config, settings, dimension, num_clients)
        self.config = config
        self.population = list(range(1, num_clients + 1))
        self.start = toy_adapter(dimension, settings.clipping_norm)
        self._path = folder / "privacy.json"
        self.ledger = Ledger.create(self._path, self.settings)
        self.strategy = cast(
            ClientLevelDP, make(config, dict(self.start), self.population, self.ledger)
        )
        if silent:
            self.strategy.generator = ZeroNoise()
        self._recorder = _Recorder(self.strategy.strategy.optimizer, self._path)
        self.strategy.strategy.optimizer = cast(ServerOptimizer, self._recorder)
        self.records: list[ArrayRecord] = []

    @property
    def reference(self) -> Arrays:
        """The global adapter now."""
        return self.strategy.strategy.reference

    @property
    def ledger_on_disk(self) -> dict[str, Any]:
        """The content of privacy.json."""
        content: dict[str, Any] = json.loads(self._path.read_text("utf-8"))
        return content

    @property
    def entered(self) -> list[Vector]:
        """The inputs of the server optimiser, by round."""
        return self._recorder.entered

    @property
    def moments(self) -> Mapping[str, Vector]:
        """The moments of the server optimiser now, by name."""
        return self._recorder.moments

    @property
    def rounds_on_disk(self) -> list[int]:
        """Rounds in the ledger's file when each step of the optimiser was taken."""
        return self._recorder.rounds_on_disk

    def cohort(self, server_round: int) -> list[int]:
        """Return the clients that the strategy asks in a round."""
        record = array_record(self.reference)
        messages = self.strategy.configure_train(
            server_round, record, ConfigRecord(), cast(Grid, None)
        )
        return [message.metadata.dst_node_id for message in messages]

    def rounds(self, count: int) -> Iterator[int]:
        """Yield rounds from 1, at most `count`, until the budget ends."""
        for server_round in range(1, count + 1):
            if not self.ledger.may_spend(self.settings.max_epsilon):
                return
            yield server_round

    def release(self, server_round: int, contents: Contents) -> Vector:
        """Aggregate one round and return its release, (d,).

        Args:
            server_round: From 1.
            contents: (node id, content) of each reply.

        Raises:
            NotAsPromisedError: Not exactly one vector entered the server optimiser, or no
                adapter was released.
        """
        before = len(self.entered)
        record, _ = self.strategy.aggregate_train(server_round, replies_of(contents))
        if len(self.entered) != before + 1:
            raise NotAsPromisedError(
                f"{len(self.entered) - before} vectors entered the server optimiser "
                "in one round"
            )
        if record is None:
            raise NotAsPromisedError("a round without usable replies released nothing")
        self.records.append(record)
        return self.entered[-1] * self.settings.num_sampled_clients

    def content(
        self, node: int, vector: Vector | npt.NDArray[np.float32]
    ) -> RecordDict:
        """Return the reply of a client with this update, (d,)."""
        return RecordDict({ARRAYS: array_record(self.update(vector))})

    def update(self, vector: Vector | npt.NDArray[np.float32]) -> Arrays:
        """Return the adapter of a client with this update, (d,), in float32."""
        arrays, start = {}, 0
        for name, value in self.reference.items():
            part = vector[start : start + value.size].reshape(value.shape)
            arrays[name] = (value + part).astype(np.float32)
            start += value.size
        return arrays


def bench_settings(
    config: RunConfig, settings: PrivacySettings, dimension: int, num_clients: int
) -> PrivacySettings:
    """Return a run's privacy settings for another number of clients and trained values.

    Noise multiplier, clipping norm, delta and sampling probability are the run's.
    """
    sampled: float = config.strategy.num_sampled(num_clients)
    if settings.sampling == "poisson":
        sampled = config.strategy.fraction_train * num_clients
    return replace(
        settings,
        population_size=num_clients,
        num_sampled_clients=sampled,
        num_trainable=dimension,
    )


def toy_adapter(dimension: int, clipping_norm: float) -> Arrays:
    """Return a non-zero adapter of two arrays, one of them a matrix."""
    rows = dimension // 4
    value = clipping_norm / 4
    return {
        "toy.lora_B.weight": np.full((rows, 2), value, np.float32),
        "toy.lora_A.weight": np.full(dimension - 2 * rows, value, np.float32),
    }


def honest_reply(
    bench: Bench, norm: float, num_examples: int | None = None
) -> RecordDict:
    """Return a reply whose update has norm `norm` * C, in the direction of all honest ones.

    Args:
        bench: The bench whose global adapter the update starts from.
        norm: In units of C; negative for the opposite direction.
        num_examples: The number that the client claims; None: none.
    """
    size, encoding = bench.settings.num_trainable, bench.config.wire.encoding
    value = np.float32(norm * bench.settings.clipping_norm / size**0.5)
    if encoding == "float32":
        arrays = bench.update(np.full(size, value))
    else:
        arrays = {k: np.full_like(v, value) for k, v in bench.reference.items()}
    record = encoded_record(arrays, encoding, np.random.default_rng(0))
    content = RecordDict({ARRAYS: record})
    if num_examples is not None:
        content[METRICS] = MetricRecord({"num-examples": num_examples})
    return content


def norm_of(vector: Vector) -> float:
    """Return the L2 norm; infinite if it is not a number, so that it counts as worst."""
    norm = float(np.linalg.norm(vector))
    return math.inf if math.isnan(norm) else norm


def flat_values(arrays: Mapping[str, Any], names: Iterable[str]) -> Vector:
    """Return arrays as one vector, (d,) float64, in the order of the names."""
    return np.concatenate([np.asarray(arrays[name], float).ravel() for name in names])


@contextlib.contextmanager
def fresh_home() -> Iterator[None]:
    """Give clients a home of their own: ledgers without a release."""
    before = os.environ.get("FEDLLM_HOME")
    with tempfile.TemporaryDirectory(prefix="fedllm-audit-home-") as home:
        os.environ["FEDLLM_HOME"] = home
        try:
            yield
        finally:
            os.environ.pop("FEDLLM_HOME")
            if before is not None:
                os.environ["FEDLLM_HOME"] = before


class _Recorder:
    """A recorder before the server optimiser."""

    def __init__(self, optimizer: ServerOptimizer, ledger: Path) -> None:
        self._optimizer = optimizer
        self._ledger = ledger
        self.entered: list[Vector] = []
        self.rounds_on_disk: list[int] = []

    @property
    def moments(self) -> Mapping[str, Vector]:
        """The real optimiser's moments."""
        return self._optimizer.moments

    def step(self, update: Vector, learning_rate: float) -> Vector:
        """Record the update and make the real optimiser's step."""
        self.entered.append(np.array(update, np.float64))
        self.rounds_on_disk.append(
            len(json.loads(self._ledger.read_text())["releases"])
        )
        return self._optimizer.step(update, learning_rate)


def replies_of(contents: Contents) -> Iterator[Message]:
    """Wrap contents as Flower would deliver them, one at a time."""
    for node_id, content in contents:
        asked = Message(RecordDict(), node_id, "train")
        # A content with a record of its own on its format stays as hostile as it is.
        if isinstance(content, RecordDict) and WIRE not in content:
            content = masked(content)
        yield Message(content, reply_to=asked)
