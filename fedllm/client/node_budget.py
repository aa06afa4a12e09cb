"""A node's budget over all client-level runs: who asks, what was promised, what is left.

A run is charged before anything is loaded or trained, so that a crash at any point leaves it
charged and a second message does not charge it again.
"""

from pathlib import Path

from fedllm.client.log import ClientLog
from fedllm.client.node_config import NodeConfig
from fedllm.config import RunConfig, fedllm_home
from fedllm.node.log import append, log_path
from fedllm.planning.noise import affordable_rounds, noise_multiplier_at
from fedllm.privacy.accounting import default_delta
from fedllm.privacy.composition import composed_epsilon
from fedllm.privacy.node_ledger import Account, Asked, Limits, NodeLedger, Promise
from fedllm.privacy.wording import plain
from fedllm.wire.resumed_run import run_name

_LARGEST_DEFAULT_DELTA = default_delta(1)


def node_ledger_folder(home: Path) -> Path:
    """Return the folder of the ledger, which all nodes with one home share."""
    return home / "ledgers" / "node"


def charge_run(
    config: RunConfig, node: NodeConfig, asked: Asked, log: ClientLog
) -> None:
    """Charge a message's run to the node, on disk, unless it was charged before.

    A simulated client has no owner and counts nothing.

    Args:
        config: The run config, with `privacy.unit="client"`.
        node: The node's config.
        asked: The message.
        log: Gets a line if the run is new.

    Raises:
        BudgetError: It would pass the node's limit, or its round was not planned.
        PrivacyError: The ledger cannot be trusted or written.
    """
    if node.is_simulated:
        return
    limits = Limits(node.max_epsilon, node.counted_delta, node.budget_period)
    folder = node_ledger_folder(fedllm_home())
    ledger = NodeLedger(folder)
    if ledger.is_new:
        log.write_new_ledger(folder)
    if ledger.charge(asked, lambda: promise_of(config), limits):
        _note(ledger.account(), asked, limits, log)


def asked_of(
    config: RunConfig, run_id: int, attempt: int, server_round: int | None
) -> Asked:
    """Return what a message asks, under the name of its run.

    Args:
        config: The settings that the run began with.
        run_id: Flower's id of the run when it began.
        attempt: Flower's id of the run that asks.
        server_round: The round; None: the run is announced.
    """
    return Asked(run_name(config, run_id), run_id, attempt, server_round)


def promise_of(config: RunConfig) -> Promise:
    """Return what a run promises, its noise calibrated as the server does it.

    If the run names neither its delta nor the number of clients, which decides the default
    one, the largest default stands for it: at that the noise is least.
    """
    strategy = config.strategy
    delta = config.privacy.delta or (
        default_delta(strategy.num_clients)
        if strategy.num_clients
        else _LARGEST_DEFAULT_DELTA
    )
    z = noise_multiplier_at(config, delta)
    return Promise(
        unit=config.privacy.unit,
        sampling=strategy.sampling,
        sampling_probability=(
            strategy.fraction_train if strategy.sampling == "poisson" else 1.0
        ),
        noise_multiplier=z,
        rounds=affordable_rounds(config, z, delta),
        delta=delta,
    )


def _note(account: Account, asked: Asked, limits: Limits, log: ClientLog) -> None:
    """Log what was spent, here and among the node's questions and answers."""
    lifetime = composed_epsilon(account.events(), limits.delta)
    bounded = composed_epsilon(account.bounded_events(limits), limits.delta)
    limit = "" if limits.max_epsilon is None else f" of {limits.max_epsilon:g}"
    log.write(
        f"client {log.number}: run {asked.run} is charged: epsilon {plain(bounded)}{limit} "
        f"in period {account.period}, {plain(lifetime)} in the lifetime, at delta "
        f"{limits.delta:g}"
    )
    if log_path().exists():
        append("spent", run_id=asked.run_id, run=asked.run, epsilon=bounded)
