"""The trustees of a sealed run: met once before round 1, and asked once a round."""

import logging
from collections import Counter
from collections.abc import Sequence

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from fedllm.config import RunConfig
from fedllm.errors import FederationError
from fedllm.privacy.agreement import Certificate
from fedllm.server.reply_stream import ReplyStream
from fedllm.strategy.sealed_dp import Roster
from fedllm.wire.messages import CONFIG, own_config, read_reply, short_name
from fedllm.wire.resumed_run import run_name
from fedllm.wire.sealed_messages import HELLO, RUN_NAME, read_certificate

logger = logging.getLogger(__name__)


def meet_trustees(
    grid: Grid,
    config: RunConfig,
    population: Sequence[int],
    run_id: int,
    instructions: ConfigRecord,
    most: int = 0,
) -> Roster:
    """Ask every node whether the run may be, and each trustee for its key of it.

    Args:
        grid: Flower's way to the nodes.
        config: The run config, of a sealed run.
        population: Node ids.
        run_id: Flower's id of the run when it began.
        instructions: What every message of the run holds.
        most: The most trustees that the run's ledger counts on; 0: all that are named.

    Raises:
        FederationError: Too few trustees answered, or two nodes have one name.
    """
    name = run_name(config, run_id)
    timeout = min(config.strategy.round_timeout, config.strategy.wait_for_clients)
    met: dict[str, tuple[int, Certificate]] = {}
    codes: Counter[str] = Counter()
    messages = [_question(node, instructions, name, timeout) for node in population]
    for reply in ReplyStream(grid, messages, timeout):
        node_id, code = reply.metadata.src_node_id, read_reply(reply, {}).code
        if code is not None:
            codes[code] += 1
            continue
        certificate = read_certificate(reply)
        if certificate is None or certificate.name not in config.trustees:
            continue
        if certificate.name in met:
            raise FederationError(
                f"privacy.trustees: nodes {short_name(met[certificate.name][0])} and "
                f"{short_name(node_id)} are both trustee {certificate.name!r}: end the one that is not"
            )
        met[certificate.name] = (node_id, certificate)
    if codes:
        logger.warning(
            "%d of %d nodes refuse this sealed run (%s); each node's own log has the reason",
            codes.total(),
            len(population),
            ", ".join(f"{code} x{number}" for code, number in codes.items()),
        )
    present = [met[name] for name in config.trustees if name in met]
    _require_enough(config, [certificate.name for _, certificate in present])
    return Roster(
        run=name,
        present=present[: most or None],
        least=config.least_trustees,
        ask=lambda sent: ReplyStream(grid, sent, config.strategy.round_timeout),
    )


def _question(
    node_id: int, instructions: ConfigRecord, run: str, timeout: float
) -> Message:
    config = own_config(instructions)
    config[RUN_NAME] = run
    return Message(
        content=RecordDict({CONFIG: config}),
        dst_node_id=node_id,
        message_type=HELLO,
        ttl=timeout,
        group_id="hello",
    )


def _require_enough(config: RunConfig, present: Sequence[str]) -> None:
    """Check the number of trustees that answered, and log who is absent.

    Raises:
        FederationError: They are too few.
    """
    absent = ", ".join(name for name in config.trustees if name not in present)
    if len(present) < config.least_trustees:
        raise FederationError(
            f"privacy.least-trustees: {config.least_trustees} have to open a round, and "
            f"{len(present)} answered (absent: {absent}): start their nodes, with "
            "trustee-name and trustee-key in the node config, or lower it"
        )
    if absent:
        logger.warning("trustees absent, so the run does without: %s", absent)
    logger.info("trustees: %s", ", ".join(present))
