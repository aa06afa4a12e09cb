"""Differential privacy whose server is not trusted: it opens a noised sum alone."""

import logging
from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from flwr.app import (
    ArrayRecord,
    ConfigRecord,
    Message,
    MetricRecord,
    RecordDict,
)
from flwr.serverapp import Grid

from fedllm.errors import FederationError, PrivacyError
from fedllm.privacy.agreement import Certificate, SlotSettings, certificates_text
from fedllm.privacy.ledger import Ledger
from fedllm.privacy.mechanism import Vector
from fedllm.privacy.pads import Residues, integers_of, packet_bytes
from fedllm.privacy.sealed_sum import deviation, is_plausible, sealed_grid
from fedllm.strategy.fedavg import AdapterFedAvg
from fedllm.strategy.server_noise import LedgerT, ServerNoise
from fedllm.wire.messages import (
    ARRAYS,
    CONFIG,
    TOTAL_ROWS,
    Reply,
    own_config,
    short_name,
)
from fedllm.wire.sealed_messages import (
    CERTIFICATES,
    PACKETS,
    SLOT,
    TALLY,
    adapter_digest,
    read_packets,
    read_residues,
    read_unopened,
)

logger = logging.getLogger(__name__)

NOT_OPENED = "not-opened"
"""Code of the updates of a round that could not be opened."""

Ask = Callable[[list[Message]], Iterable[Message]]
"""Sends messages and yields the replies of those that answer in time."""


@dataclass
class Roster:
    """The trustees of a run, as the server knows them.

    Attributes:
        run: Name of the run, which their keys are signed for.
        present: Node id and certificate of each that may be asked, in order.
        least: Fewest that may open a round.
        ask: The way to them.
        misses: By name, how many slots each that was asked did not open.
    """

    run: str
    present: list[tuple[int, Certificate]]
    least: int
    ask: Ask
    misses: Counter[str] = field(default_factory=Counter)


@dataclass
class _Slot:
    """A round that is under way: what was sent, and what came."""

    server_round: int
    settings: SlotSettings
    instructions: ConfigRecord
    total: Residues
    senders: list[int] = field(default_factory=list)
    packets: list[tuple[bytes, ...]] = field(default_factory=list)


@dataclass(frozen=True)
class SlotUnits:
    """What the settings of a slot say of the vectors that it sums.

    Attributes:
        norm: The largest norm of one vector: C of an update, G of a record's gradient.
        num_clients: The most clients whose messages the sum may hold.
        num_records: The most records that it has room for; 0: a vector is an update.
        total_rows: The rows that all clients declared; 0 likewise.
    """

    norm: float
    num_clients: int
    num_records: int = 0
    total_rows: int = 0


class SealedNoise(ServerNoise[LedgerT]):
    """Differential privacy around `AdapterFedAvg`, by trustees, whatever the unit.

    A reply is d values modulo 2^32 under one pad of each trustee. The server adds them up. Each
    trustee returns, once for each slot, the sum of its pads less its noise; what the server
    subtracts that from is the noised sum. A slot is a round, and no round is asked for twice.

    Guarantee:
        Total over replies, of clients and of trustees. A slot is in the ledger, on disk,
        before any client is asked: one that is lost counts as spent. The server holds one sum,
        one reply and one answer at a time. For what it cannot learn it is not the one to
        vouch: `client.sealing` and `client.trustee` are.

    Args:
        strategy: The wrapped strategy.
        ledger: What the run has spent; also holds z, the norm, the divisor and c.
        roster: The trustees.
    """

    def __init__(
        self, strategy: AdapterFedAvg, ledger: LedgerT, roster: Roster
    ) -> None:
        super().__init__(strategy, ledger)
        self.roster = roster
        self._spoilers: set[int] = set()
        self._slot: _Slot | None = None

    @property
    @abstractmethod
    def units(self) -> SlotUnits:
        """What one vector of the sum is, and how many there may be."""

    @abstractmethod
    def reach(self, senders: Sequence[int]) -> float:
        """Return the most vectors that a sum of these nodes holds."""

    @abstractmethod
    def step(self, opened: Vector) -> Vector:
        """Return the mean update that an opened sum makes, (d,)."""

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Enter the slot, and make the messages with its settings and certificates.

        Raises:
            FederationError: Too few trustees are left.
            PrivacyError: The round would pass the budget, or was asked for before.
        """
        roster, settings = self.roster, self.ledger.settings
        if len(roster.present) < roster.least:
            raise FederationError(
                f"privacy.least-trustees: {roster.least} have to open a round, and "
                f"{len(roster.present)} are left: resume the run when they are back"
            )
        messages = list(super().configure_train(server_round, arrays, config, grid))
        sent = messages[0].content.array_records[ARRAYS]
        units = self.units
        slot = SlotSettings(
            run=roster.run,
            slot=server_round,
            planned_slots=settings.planned_rounds,
            size=self.strategy.size,
            num_clients=units.num_clients,
            num_records=units.num_records,
            total_rows=units.total_rows,
            clipping_norm=units.norm,
            noise_multiplier=settings.noise_multiplier,
            colluding=settings.colluding,
            trustees=tuple((c.name, c.key) for _, c in roster.present),
            adapter=adapter_digest(sent),
        )
        certificates = certificates_text([c for _, c in roster.present])
        for message in messages:
            record = message.content.config_records[CONFIG]
            record[SLOT], record[CERTIFICATES] = slot.text, certificates
            if units.total_rows:
                # A node with max-seconds reckons by it; what it pays by is the slot's.
                record[TOTAL_ROWS] = units.total_rows
        # Clients count a slot once it is asked for, opened or not, and so does the server.
        self.ledger.spend(server_round)
        total = np.zeros(slot.size, np.uint32)
        self._slot = _Slot(server_round, slot, config, total)
        return messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Add up what came, have it opened, then move the adapter.

        Returns:
            The new adapter; None if the round could not be opened, and is lost.

        Raises:
            PrivacyError: The round was not configured.
        """
        slot, self._slot = self._slot, None
        if slot is None or slot.server_round != server_round:
            raise PrivacyError(f"round {server_round}: no slot was asked for")
        self._gather(slot, replies)
        opened = self._opened(slot) if slot.senders else None
        if opened is None:
            for node_id in slot.senders:
                self.strategy.reject(Reply(node_id), NOT_OPENED)
            return None, None
        update = self.step(opened)
        return self.strategy.apply_update(server_round, update), None

    def noised_update(self, replies: Iterable[Message]) -> Vector:
        """Return the noise of a round without any client: the trustees', drawn here.

        It is what the noise probe measures. No round comes this way.
        """
        settings, units = self.ledger.settings, self.units
        size, trustees = self.strategy.size, settings.trustees
        grid = sealed_grid(
            settings.noise_multiplier,
            trustees,
            settings.colluding,
            units.num_records or units.num_clients,
            size,
        )
        noise = grid.noise(size, self.generator)
        for _ in range(trustees - 1):
            noise += grid.noise(size, self.generator)
        return self.step(grid.decode(noise, units.norm))

    def _gather(self, slot: _Slot, replies: Iterable[Message]) -> None:
        """Add up the padded updates, one at a time, and keep the packets beside them."""
        keys = slot.settings.trustees
        length = packet_bytes(len(keys[0][1]) > 64)
        found: list[tuple[Residues, tuple[bytes, ...] | None]] = []

        def decode(message: Message) -> Reply:
            reply, vector = read_residues(message, slot.settings.size)
            found.clear()
            if vector is not None:
                found.append((vector, read_packets(message, len(keys), length)))
            return reply

        seen: set[bytes] = set()
        for reply in self.strategy.decoded(replies, decode):
            vector, packets = found.pop() if found else (None, None)
            # A packet that came twice would have every trustee refuse the whole list.
            if (
                vector is None
                or packets is None
                or reply.node_id in self._spoilers
                or not seen.isdisjoint(packets)
            ):
                self.strategy.reject(reply, "malformed")
                continue
            seen.update(packets)
            slot.total += vector
            slot.senders.append(reply.node_id)
            slot.packets.append(packets)

    def _opened(self, slot: _Slot) -> Vector | None:
        """Have every trustee open the slot; None if one did not, or the sum is absurd."""
        asked = list(self.roster.present)
        messages = [
            self._tally_message(slot, place, node_id)
            for place, (node_id, _) in enumerate(asked)
        ]
        missing = {node_id: certificate.name for node_id, certificate in asked}
        is_spoiled = False
        for message in self.roster.ask(messages):
            node_id = message.metadata.src_node_id
            _, vector = read_residues(message, slot.settings.size)
            spoilers = read_unopened(message, len(slot.senders))
            if node_id not in missing or (vector is None and not spoilers):
                continue
            name = missing.pop(node_id)
            if vector is not None:
                slot.total -= vector
            else:
                is_spoiled = True
                self._note_spoilers(slot, name, spoilers)
        if missing:
            self._drop(slot.server_round, missing)
        return None if missing or is_spoiled else self._checked(slot)

    def _tally_message(self, slot: _Slot, place: int, node_id: int) -> Message:
        """Return what asks one trustee to open the slot: its packets and the settings."""
        config = own_config(slot.instructions)
        config[SLOT] = slot.settings.text
        config[PACKETS] = [packets[place] for packets in slot.packets]
        return Message(
            content=RecordDict({CONFIG: config}),
            dst_node_id=node_id,
            message_type=TALLY,
            ttl=self.strategy.config.strategy.round_timeout,
            group_id=str(slot.server_round),
        )

    def _note_spoilers(self, slot: _Slot, name: str, places: Sequence[int]) -> None:
        """Leave out, from the next round on, clients whose packets do not open."""
        nodes = sorted(slot.senders[place] for place in places)
        self._spoilers.update(nodes)
        logger.warning(
            "round %d is lost: trustee %s cannot open what node %s sent, which is left out "
            "of later rounds",
            slot.server_round,
            name,
            ", ".join(map(short_name, nodes)),
        )

    def _drop(self, server_round: int, missing: dict[int, str]) -> None:
        """Leave out trustees that did not open a slot, and log it."""
        self.roster.misses.update(missing.values())
        self.roster.present = [
            entry for entry in self.roster.present if entry[0] not in missing
        ]
        logger.warning(
            "round %d is lost: trustee %s did not open it in time, or refused; %d are left "
            "of at least %d",
            server_round,
            ", ".join(missing.values()),
            len(self.roster.present),
            self.roster.least,
        )

    def _checked(self, slot: _Slot) -> Vector | None:
        """Return the opened sum in the order of the reference; None if it is too long."""
        settings = slot.settings
        clipping_norm = settings.clipping_norm
        opened = settings.grid.decode(integers_of(slot.total), clipping_norm)
        noise = deviation(
            settings.noise_multiplier, len(settings.trustees), settings.colluding
        )
        if not is_plausible(opened, clipping_norm, noise, self.reach(slot.senders)):
            logger.warning(
                "round %d is lost: the opened sum has a length that %d honest clients and "
                "the trustees' noise cannot have: a client is not clipped, or a trustee "
                "kept back its noise; who it is cannot be seen",
                slot.server_round,
                len(slot.senders),
            )
            return None
        return _in_order(opened, self.strategy.reference)


class SealedDP(SealedNoise[Ledger]):
    """Client level: a sum of clipped updates. What holds is `SealedNoise`'s."""

    @property
    def units(self) -> SlotUnits:
        """An update of norm C for each client of a round."""
        settings = self.ledger.settings
        count = round(settings.num_sampled_clients)
        return SlotUnits(settings.clipping_norm, count)

    def reach(self, senders: Sequence[int]) -> float:
        """Return the number of updates."""
        return len(senders)

    def step(self, opened: Vector) -> Vector:
        """Return the sum over n, which is fixed before round 1."""
        return opened / self.ledger.settings.num_sampled_clients


def _in_order(vector: Vector, reference: dict[str, npt.NDArray[np.float32]]) -> Vector:
    """Return a vector in the order of the reference; clients send sorted names."""
    parts, start = {}, 0
    for name in sorted(reference):
        parts[name] = vector[start : start + reference[name].size]
        start += reference[name].size
    ordered: Vector = np.concatenate([parts[name] for name in reference])
    return ordered
