"""Which clients take part: wait for them, and replace those that left."""

import logging
import time
from collections.abc import Collection, Sequence

from flwr.serverapp import Grid

from fedllm.config import RunConfig
from fedllm.errors import FederationError

logger = logging.getLogger(__name__)

LEAST_CLIENTS = 2
"""A federation of one client would be that client's own training."""


def replace_departed(
    population: Sequence[int], connected: Collection[int]
) -> list[int]:
    """Return the population with new nodes in place of those that are gone.

    A SuperNode without a key of its own has another id each time it starts, and a
    SuperLink without a database gives new ones to all. Places are kept and never
    become more, so n and N hold.
    """
    fresh = iter(sorted(set(connected) - set(population)))
    return [n if n in connected else next(fresh, n) for n in population]


def present_population(
    population: Sequence[int], connected: Collection[int], num_clients: int
) -> list[int]:
    """Return the clients of the next round of a run without DP: those that are there now.

    Args:
        population: Node ids of the round before, whose order is kept.
        connected: Node ids of all that are connected.
        num_clients: `strategy.num-clients`, the most; 0: any number.

    Returns:
        Who stayed, with new nodes in the places of those that left, then who else joined; the
        population as it was if nobody is there.
    """
    kept = [n for n in replace_departed(population, connected) if n in connected]
    present = kept + sorted(set(connected) - set(kept))
    return present[: num_clients or None] or list(population)


def wait_for_clients(
    grid: Grid,
    config: RunConfig,
    known: Sequence[int] = (),
    least_clients: int = LEAST_CLIENTS,
) -> list[int]:
    """Wait until enough clients are connected and return their node ids.

    Args:
        grid: Flower's way to the clients.
        config: The run config.
        known: Clients of a run that is resumed: as many must be there again.
        least_clients: Fewest clients that a run may have.

    Raises:
        FederationError: Too few are connected when the time is up.
    """
    asked_for = len(known) or config.strategy.num_clients
    least = max(asked_for, least_clients)
    deadline = time.monotonic() + config.strategy.wait_for_clients
    logged = False
    while True:
        nodes = sorted(grid.get_node_ids())
        if known and len(nodes) >= asked_for:
            return replace_departed(known, nodes)
        if len(nodes) >= least:
            # More than were asked for: the first by id, which Flower draws at random.
            return nodes[:asked_for] if asked_for else nodes
        if time.monotonic() > deadline:
            raise FederationError(
                f"strategy.num-clients: {least} clients are asked for, but "
                f"{len(nodes)} are connected after {config.strategy.wait_for_clients:g} "
                "s; start more SuperNodes (in simulation add --federation-config "
                f'"num-supernodes={least}"), or lower strategy.num-clients '
                "(0 takes those that are there)"
            )
        if not logged:
            logger.info("waiting for clients: %d of %d connected", len(nodes), least)
            logged = True
        time.sleep(0.5)
