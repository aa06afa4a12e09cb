"""The nodes of a sealed run: met before round 1, and again if they are new or were away."""

import logging
import shutil
import time
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from fedllm.config import RunConfig
from fedllm.errors import FederationError
from fedllm.privacy.agreement import Certificate
from fedllm.privacy.sealed_folder import simulated_folder
from fedllm.server.declared_rows import DeclaredRows
from fedllm.server.local_grid import is_simulation
from fedllm.server.population import LEAST_CLIENTS, replace_departed
from fedllm.server.reply_stream import ReplyStream
from fedllm.strategy.sealed_dp import Roster
from fedllm.wire.messages import (
    CONFIG,
    own_config,
    read_declared_rows,
    read_reply,
    short_name,
)
from fedllm.wire.resumed_run import run_name
from fedllm.wire.sealed_messages import (
    HELLO,
    RUN_NAME,
    read_certificate,
    read_has_data,
)

logger = logging.getLogger(__name__)

MOST_MISSES = 3
"""Slots that a trustee may fail to open before it is out until the run is resumed."""

_GREETING = 15.0
"""Seconds that a round waits for a trustee to come back: a few messages' time."""


@dataclass(frozen=True)
class Meeting:
    """Who takes part in a sealed run.

    Attributes:
        population: Node ids of all clients.
        declared: Node id -> the rows that its owner declared; empty but at record level.
        roster: The trustees.
    """

    population: list[int]
    declared: dict[int, int]
    roster: Roster


@dataclass
class _Said:
    """What nodes said when they were asked whether the run may be."""

    without_data: set[int] = field(default_factory=set)
    declared: dict[int, int] = field(default_factory=dict)
    codes: dict[int, str] = field(default_factory=dict)
    trustees: dict[str, tuple[int, Certificate]] = field(default_factory=dict)


class SealedNodes:
    """Asks nodes what they are, and keeps who may open rounds and who may train.

    A node that says that it has no data is no client: it is never asked to train, and does
    not count. Which trustees a slot has is the server's choice, as far as each client's
    floors and pins allow, so that one that was away may come back: what keeps a slot from
    being opened twice is each trustee's own ledger.

    Args:
        grid: Flower's way to the nodes.
        config: The run config, of a sealed run.
        run_id: Flower's id of the run when it began.
        instructions: What every message of the run holds.
        most: The most trustees that the run's ledger counts on; 0: all that are named.
    """

    def __init__(
        self,
        grid: Grid,
        config: RunConfig,
        run_id: int,
        instructions: ConfigRecord,
        most: int = 0,
    ) -> None:
        self.waits = not is_simulation(grid)
        """Whether nodes may still connect: all of a simulation are there at once."""
        self._grid, self._config = grid, config
        self._instructions, self._run_id = instructions, run_id
        self._most = most or len(config.trustees)
        self._asked: set[int] = set()
        self._said = _Said()
        self._absent: dict[str, int] = {}
        self._seen: Counter[str] = Counter()
        timeout = config.strategy.round_timeout
        self.roster = Roster(
            run=run_name(config, run_id),
            present=[],
            least=config.least_trustees,
            ask=lambda sent: ReplyStream(grid, sent, timeout),
        )

    def meet(
        self, known: Sequence[int] = (), least_clients: int = LEAST_CLIENTS
    ) -> Meeting:
        """Ask every node whether the run may be, and each trustee for its key of it.

        Args:
            known: Clients of a run that is resumed: as many must be there again.
            least_clients: Fewest clients that a run may have.

        Raises:
            FederationError: Too few clients or trustees answered in time, or two nodes
                have one name.
        """
        strategy = self._config.strategy
        asked_for = len(known) or strategy.num_clients
        least = max(asked_for, least_clients)
        deadline = time.monotonic() + strategy.wait_for_clients
        while True:
            connected = sorted(self._grid.get_node_ids())
            timeout = min(strategy.round_timeout, strategy.wait_for_clients)
            self._ask(set(connected) - self._asked, timeout)
            clients = [node for node in connected if self._may_train(node)]
            self.roster.present = self._openers(connected)
            is_enough = len(clients) >= least and self._are_enough
            if is_enough or not self.waits or time.monotonic() > deadline:
                break
            time.sleep(0.5)
        self._log_refusals(len(connected))
        self._require_clients(clients, least)
        self._require_trustees()
        self._most = len(self.roster.present)
        declared: dict[int, int] = {}
        if self._config.is_joint and not known:
            said = DeclaredRows(self._said.declared, self._said.codes)
            declared = said.of(clients, self._config, least_clients)
            clients = list(declared)
        if known:
            return Meeting(replace_departed(known, clients), {}, self.roster)
        clients = clients[:asked_for] if asked_for else clients
        declared = {node: declared[node] for node in clients if node in declared}
        return Meeting(clients, declared, self.roster)

    def greet(self) -> set[int]:
        """Ask nodes that are new, and trustees that were away, before a round.

        Returns:
            The connected nodes that may be clients.

        Raises:
            FederationError: Two nodes have one name.
        """
        strategy = self._config.strategy
        deadline = time.monotonic() + strategy.wait_for_clients
        timeout, is_logged = min(strategy.round_timeout, _GREETING), False
        while True:
            connected = set(self._grid.get_node_ids())
            away = self._away() & connected
            self._ask((connected - self._asked) | away, timeout)
            before = {certificate.name for _, certificate in self.roster.present}
            self.roster.present = self._openers(connected)
            for _, certificate in self.roster.present:
                if certificate.name not in before:
                    logger.info("trustee %s is back", certificate.name)
            if self._are_enough or not self.waits or time.monotonic() > deadline:
                return {node for node in connected if self._may_train(node)}
            if not is_logged:
                logger.info(
                    "waiting for trustees: %d of at least %d are there",
                    len(self.roster.present),
                    self.roster.least,
                )
                is_logged = True
            time.sleep(1.0)

    def end(self, home: Path) -> None:
        """Delete what the virtual nodes of a simulation kept of a run that has ended.

        Nobody asks for a slot of it again: a run that is resumed has not ended.

        Args:
            home: fedllm's folder.
        """
        if self.waits:
            return
        try:
            shutil.rmtree(simulated_folder(home, self._run_id))
        except FileNotFoundError:
            return  # Its nodes are real ones in this process, as in tests.
        except OSError as error:
            logger.warning(
                "%s: cannot be deleted: %s; nothing needs it any more",
                simulated_folder(home, self._run_id),
                error.strerror,
            )

    @property
    def _are_enough(self) -> bool:
        return len(self.roster.present) >= self.roster.least

    def _away(self) -> set[int]:
        """Return the nodes of trustees that failed to open a slot and may yet come back."""
        for name, misses in self.roster.misses.items():
            if misses > self._seen[name] and name in self._said.trustees:
                # Until it answers it is not back.
                self._absent[name], _ = self._said.trustees.pop(name)
        self._seen = Counter(self.roster.misses)
        return {
            node
            for name, node in self._absent.items()
            if name not in self._said.trustees and self._seen[name] < MOST_MISSES
        }

    def _openers(self, connected: Collection[int]) -> list[tuple[int, Certificate]]:
        """Return the trustees that a slot may have, in order, no more than are counted on."""
        named = [self._said.trustees.get(name) for name in self._config.trustees]
        found = [
            (node, certificate)
            for node, certificate in filter(None, named)
            if node in connected and self._seen[certificate.name] < MOST_MISSES
        ]
        return found[: self._most]

    def _may_train(self, node: int) -> bool:
        return node not in self._said.without_data

    def _ask(self, nodes: Iterable[int], timeout: float) -> None:
        """Ask nodes what they are, and keep what they say.

        Raises:
            FederationError: Two nodes have one name.
        """
        asked = sorted(nodes)
        self._asked.update(asked)
        named: dict[str, int] = {}
        messages = [self._question(node, timeout) for node in asked]
        for reply in ReplyStream(self._grid, messages, timeout):
            node, code = reply.metadata.src_node_id, read_reply(reply, {}).code
            if code is not None:
                self._said.codes[node] = code
                continue
            if not read_has_data(reply):
                self._said.without_data.add(node)
            rows = read_declared_rows(reply)
            if rows is not None:
                self._said.declared[node] = rows
            certificate = read_certificate(reply)
            if certificate is None or certificate.name not in self._config.trustees:
                continue
            if certificate.name in named:
                raise FederationError(
                    f"privacy.trustees: nodes {short_name(named[certificate.name])} and "
                    f"{short_name(node)} are both trustee {certificate.name!r}: end the one "
                    "that is not"
                )
            named[certificate.name] = node
            self._said.trustees[certificate.name] = (node, certificate)

    def _question(self, node_id: int, timeout: float) -> Message:
        config = own_config(self._instructions)
        config[RUN_NAME] = self.roster.run
        return Message(
            content=RecordDict({CONFIG: config}),
            dst_node_id=node_id,
            message_type=HELLO,
            ttl=timeout,
            group_id="hello",
        )

    def _log_refusals(self, count: int) -> None:
        """Log by code how many nodes refuse the run."""
        codes = Counter(self._said.codes.values())
        if codes:
            logger.warning(
                "%d of %d nodes refuse this sealed run (%s); each node's own log has the reason",
                codes.total(),
                count,
                ", ".join(f"{code} x{number}" for code, number in codes.items()),
            )

    def _require_clients(self, clients: Sequence[int], least: int) -> None:
        """Check the number of nodes that may be clients.

        Raises:
            FederationError: They are too few.
        """
        if len(clients) < least:
            raise FederationError(
                f"strategy.num-clients: {least} clients are asked for, but {len(clients)} "
                f"nodes with data are connected, and {len(self._said.without_data)} trustees "
                "without"
            )

    def _require_trustees(self) -> None:
        """Check the number of trustees that answered, and log who is absent.

        Raises:
            FederationError: They are too few.
        """
        names = [certificate.name for _, certificate in self.roster.present]
        absent = ", ".join(name for name in self._config.trustees if name not in names)
        if not self._are_enough:
            raise FederationError(
                f"privacy.least-trustees: {self.roster.least} have to open a round, and "
                f"{len(names)} answered (absent: {absent}): start their nodes, with "
                "trustee-name and trustee-key in the node config, or lower it"
            )
        if absent:
            logger.warning("trustees absent, so the run does without: %s", absent)
        logger.info("trustees: %s", ", ".join(names))
