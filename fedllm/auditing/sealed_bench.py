"""The test bench of a sealed run: real clients, real trustees and the real opening.

The audit made the trustees' keys, so it reads what no party of a run can: the integers below
a client's pads, and each trustee's noise. Both are exact. It works the pads out by itself,
from AES alone.
"""

import contextlib
import math
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import ECB
from flwr.app import ConfigRecord, Message, RecordDict

from fedllm.adapters.spec import Arrays
from fedllm.auditing.harness import (
    NUM_CLIENTS,
    Bench,
    Contents,
    NotAsPromisedError,
    Setup,
    fresh_home,
)
from fedllm.config import RunConfig, WireConfig
from fedllm.errors import FedllmError
from fedllm.privacy.agreement import Certificate, SlotSettings
from fedllm.privacy.ledger import Ledger, PrivacySettings
from fedllm.privacy.mechanism import Integers, Vector
from fedllm.privacy.pads import Residues, SealingKey
from fedllm.privacy.sealed_sum import SealedGrid
from fedllm.strategy.build import make_strategy
from fedllm.strategy.sealed_dp import Roster, SealedDP
from fedllm.wire.masking import masked
from fedllm.wire.messages import ARRAYS, CONFIG, array_record, error_content
from fedllm.wire.resumed_run import run_name
from fedllm.wire.sealed_messages import (
    HELLO,
    PACKETS,
    RUN_NAME,
    SEALED,
    SLOT,
    TALLY,
    read_certificate,
    read_residues,
)

RUN_ID = 1
_BLOCK_BYTES = 16

Train = Callable[[], tuple[Mapping[str, Any], Arrays]]
"""What stands in the place of a training: trained arrays, and those that were received."""


class OpensOnce(Protocol):
    """A trustee."""

    def tally(self, settings: SlotSettings, packets: Sequence[bytes]) -> Any:
        """Open the packets of a slot."""


class Parties(Protocol):
    """The nodes of a toy federation, each a client, the first ones trustees too."""

    def answer(
        self, node: int, message: Message, train: Train | None = None
    ) -> RecordDict:
        """Return a node's reply.

        Raises:
            FedllmError: It refuses.
        """

    def trustee(self, name: str) -> OpensOnce:
        """Return a trustee as it is when its process begins."""

    def sealing_key(self, name: str) -> SealingKey:
        """Return the private key that a trustee has of the run now."""

    def signed(self, certificate: Certificate) -> Certificate:
        """Return a certificate with the signature of the trustee that it names."""

    def last_slot(self, name: str) -> int:
        """Return the slot that a trustee has on its disk as answered last."""


MakeParties = Callable[[RunConfig, int], Parties]
"""Makes the parties of a config and a number of nodes, in the home that is set."""


@dataclass(frozen=True, kw_only=True)
class SealedSetup(Setup):
    """The settings of an audit of a sealed run.

    Attributes:
        make_parties: Makes the nodes.
    """

    make_parties: MakeParties

    @contextlib.contextmanager
    def bench(
        self,
        dimension: int,
        num_clients: int = NUM_CLIENTS,
        silent: bool = False,
        config: RunConfig | None = None,
    ) -> "Iterator[SealedBench]":
        """Yield a bench with fresh parties in a home of their own."""
        with fresh_home(), tempfile.TemporaryDirectory(prefix="fedllm-audit-") as name:
            yield SealedBench(
                _as_promised(config or self.config, self.settings),
                self.settings,
                dimension,
                num_clients,
                Path(name),
                self.make_parties,
                silent,
            )

    def planning(self, rounds: int) -> "SealedSetup":
        """Return a setup with at least so many rounds planned, each with the same noise."""
        config, settings = self.config, self.settings
        rounds = max(rounds, settings.planned_rounds)
        privacy = replace(config.privacy, max_epsilon=0.0)
        return replace(
            self,
            config=replace(config, num_server_rounds=rounds, privacy=privacy),
            settings=replace(settings, planned_rounds=rounds, max_epsilon=0.0),
        )

    def asking_all(self) -> "SealedSetup":
        """Return a setup that asks every client, which costs what a fixed cohort costs."""
        config, settings = self.config, self.settings
        strategy = replace(config.strategy, sampling="all", fraction_train=1.0)
        return replace(
            self,
            config=replace(config, strategy=strategy),
            settings=replace(settings, sampling="all"),
        )


class SealedBench(Bench):
    """One strategy of `make_strategy`, and nodes that answer it by their own code.

    The release of a round is what a server with the noise of c trustees sees: theirs is
    taken off.

    Args:
        config: The run config, with the noise multiplier that is promised.
        settings: The privacy settings that the run promises.
        dimension: d of the toy adapter, at least 8.
        num_clients: N of the toy federation.
        folder: The folder of the ledger; one folder a bench.
        make_parties: Makes the nodes.
        silent: Take all trustees' noise off each release.
    """

    def __init__(
        self,
        config: RunConfig,
        settings: PrivacySettings,
        dimension: int,
        num_clients: int,
        folder: Path,
        make_parties: MakeParties,
        silent: bool = False,
    ) -> None:
        self._make_parties = make_parties
        self._is_silent = silent
        self._asked: list[int] = []
        self._round = 0
        self.rounds_when_asked: list[int] = []
        self.tallies: dict[str, tuple[Sequence[bytes], Residues]] = {}
        super().__init__(
            config, settings, dimension, num_clients, folder, self._make_sealed
        )

    def _make_sealed(
        self,
        config: RunConfig,
        reference: Arrays,
        population: list[int],
        ledger: Ledger | None,
    ) -> SealedDP:
        names = config.trustees
        self.parties = self._make_parties(config, max(len(population), len(names)))
        run = run_name(config, RUN_ID)
        present = [(node, self._met(node, run)) for node in range(1, len(names) + 1)]
        roster = Roster(run, present, config.least_trustees, self._ask)
        strategy = make_strategy(config, reference, population, ledger, roster)
        assert isinstance(strategy, SealedDP)
        self.keys = {name: self.parties.sealing_key(name) for name in names}
        self.sealed_strategy = strategy
        return strategy

    def _met(self, node: int, run: str) -> Certificate:
        message = Message(
            RecordDict({CONFIG: ConfigRecord({RUN_NAME: run})}), node, HELLO
        )
        reply = Message(masked(self.parties.answer(node, message)), reply_to=message)
        certificate = read_certificate(reply)
        if certificate is None:
            raise NotAsPromisedError(f"trustee {node} shows no key of the run")
        return certificate

    @property
    def slot(self) -> SlotSettings:
        """The settings of the slot that was asked for last."""
        record = self.message.content.config_records[CONFIG]
        return SlotSettings.parse(record[SLOT])

    @property
    def grid(self) -> SealedGrid:
        """The public grid of all slots of the bench."""
        return self.slot.grid

    def cohort(self, server_round: int) -> list[int]:
        """Return the clients that the strategy asks in a round, which is spent then."""
        record = array_record(self.reference)
        grid: Any = None
        messages = list(
            self.strategy.configure_train(
                server_round, record, _asked(server_round), grid
            )
        )
        self.message = messages[0]
        self._asked = [message.metadata.dst_node_id for message in messages]
        self._round = server_round
        return list(self._asked)

    def content(
        self, node: int, vector: Vector | npt.NDArray[np.float32]
    ) -> RecordDict:
        """Return the reply of a client whose training adds this update, (d,)."""
        return self.trained(node, self.update(vector))

    def trained(self, node: int, arrays: Mapping[str, Any]) -> RecordDict:
        """Return the reply of a client whose training returns these arrays."""
        self.rounds_when_asked.append(len(self.ledger_on_disk["releases"]))
        return self.parties.answer(node, self.message, lambda: (arrays, self.reference))

    def release(self, server_round: int, contents: Contents) -> Vector:
        """Aggregate one round, have it opened, and return what the server sees, (d,).

        A round without any reply is not opened, so a client that sends zero stands in.

        Args:
            server_round: From 1.
            contents: (node id, content) of each reply, made by `content`.

        Raises:
            NotAsPromisedError: As of `Bench.release`, or the round was not opened.
        """
        if server_round != self._round:
            self.cohort(server_round)
        seen = super().release(server_round, self._or_zero(contents))
        names = self.slot.names
        told = names if self._is_silent else names[: self.slot.colluding]
        unit = self.settings.clipping_norm / self.grid.sensitivity
        for name in told:
            seen = seen - self.in_adapters_order(self.noise_of(name)) * unit
        return seen

    def integers(self, content: RecordDict) -> Integers:
        """Return what is below the pads of a client's reply, (d,) as it travels."""
        total = residues_of(content)
        for name, seed in zip(self.slot.names, self.seeds(content), strict=True):
            if seed is None:
                raise NotAsPromisedError(f"a packet does not open at trustee {name}")
            total = total - pad(seed, len(total))
        return signed(total)

    def seeds(self, content: RecordDict) -> list[bytes | None]:
        """Return the seeds that a client's reply brings each trustee."""
        packets: Any = content.config_records[SEALED][PACKETS]
        return [
            self.keys[name].open(packet, self.slot.info(name))
            for name, packet in zip(self.slot.names, packets, strict=True)
        ]

    def noise_of(self, name: str) -> Integers:
        """Return the noise of a trustee in the slot that was opened last, (d,) as it travels.

        Raises:
            NotAsPromisedError: It did not open it.
        """
        if name not in self.tallies:
            raise NotAsPromisedError(f"trustee {name} did not open the round")
        packets, vector = self.tallies[name]
        total = np.zeros_like(vector)
        for packet in packets:
            seed = self.keys[name].open(packet, self.slot.info(name))
            if seed is None:
                raise NotAsPromisedError(f"trustee {name} opened another's packet")
            total += pad(seed, len(total))
        return signed(total - vector)

    def in_adapters_order(self, values: Integers) -> Vector:
        """Return values in the order of the adapter; what travels has sorted names."""
        parts, start = {}, 0
        for name in sorted(self.start):
            parts[name] = values[start : start + self.start[name].size]
            start += self.start[name].size
        ordered = np.concatenate([parts[name] for name in self.start])
        return ordered.astype(np.float64)

    def tally_message(self, name: str, packets: Sequence[bytes]) -> Message:
        """Return what asks a trustee to open the slot that was asked for last."""
        config = ConfigRecord({SLOT: self.slot.text, PACKETS: list(packets)})
        node = self.slot.names.index(name) + 1
        return Message(RecordDict({CONFIG: config}), node, TALLY)

    def _or_zero(self, contents: Contents) -> Contents:
        is_empty = True
        for node, content in contents:
            is_empty = False
            yield node, content
        if is_empty:
            zero = np.zeros(self.settings.num_trainable)
            yield self._asked[0], self.content(self._asked[0], zero)

    def _ask(self, messages: list[Message]) -> Iterable[Message]:
        """Have the trustees answer, and note what they were asked and returned."""
        self.tallies.clear()
        for message in messages:
            node = message.metadata.dst_node_id
            try:
                content = self.parties.answer(node, message)
            except FedllmError:
                content = error_content("failed", None)
            reply = Message(masked(content), reply_to=message)
            _, vector = read_residues(reply, self.settings.num_trainable)
            if vector is not None:
                packets: Any = message.content.config_records[CONFIG][PACKETS]
                name = self.config.trustees[node - 1]
                self.tallies[name] = list(packets), vector
            yield reply


def pad(seed: bytes, size: int) -> Residues:
    """Return the pad of a seed, (size,), by AES alone.

    Block i of the stream is the number i, 16 bytes with the highest first, encrypted under
    the seed; a value is four bytes of it, the lowest first.
    """
    blocks = math.ceil(4 * size / _BLOCK_BYTES)
    counters = np.zeros((blocks, 2), ">u8")
    counters[:, 1] = np.arange(blocks)
    cipher = Cipher(AES(seed), ECB()).encryptor()
    stream = cipher.update(counters.tobytes())
    return np.frombuffer(stream, "<u4")[:size].astype(np.uint32)


def signed(values: Residues) -> Integers:
    """Return the integers next to zero that residues modulo 2^32 stand for."""
    whole = values.astype(np.int64)
    return np.where(whole >= 1 << 31, whole - (1 << 32), whole)


def residues_of(content: RecordDict) -> Residues:
    """Return a client's padded update, (d,), before it is masked for the way."""
    values = content.array_records[ARRAYS].to_numpy_ndarrays()[0]
    return np.frombuffer(values.tobytes(), "<u4").astype(np.uint32)


def _as_promised(config: RunConfig, settings: PrivacySettings) -> RunConfig:
    """Return a config that names the noise, and the trustees that the run had."""
    privacy = replace(
        config.privacy,
        noise_multiplier=settings.noise_multiplier,
        target_epsilon=0.0,
        delta=settings.delta,
        trustees=",".join(config.trustees[: settings.trustees]),
        least_trustees=0,
    )
    return replace(config, privacy=privacy, wire=WireConfig())


def _asked(server_round: int) -> ConfigRecord:
    return ConfigRecord({"server-round": server_round})
