"""What a round leaves behind: its warnings, its log line, its line in metrics.jsonl."""

import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fedllm.config import RunConfig
from fedllm.errors import FederationError
from fedllm.server.account import PrivacyAccount
from fedllm.strategy.round_stats import Round
from fedllm.strategy.sealed_dp import NOT_OPENED
from fedllm.strategy.server_optimizer import cosine
from fedllm.wire.masking import OTHER_VERSION, WIRE_FORMAT
from fedllm.wire.messages import ERROR_CODES, short_name

if TYPE_CHECKING:
    from fedllm.evaluation.held_out_loss import HeldOut

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RoundReport:
    """One finished round.

    Attributes:
        server_round: The round; 0 is the untuned model.
        stats: What the strategy counted.
        loss: Validation loss on public rows; None: not scored.
        pairs: The score on them if they are pairs.
        clients: The clients' own losses, as `aggregate_evaluate` returns them.
        seconds: Phase -> seconds; None: not known, or a secret.
        total_seconds: Seconds of the whole round.
    """

    server_round: int
    stats: Round = field(default_factory=Round)
    loss: float | None = None
    pairs: "HeldOut | None" = None
    clients: Mapping[str, Any] = field(default_factory=dict)
    seconds: Mapping[str, float | None] = field(default_factory=dict)
    total_seconds: float = 0.0


def metrics_line(
    config: RunConfig, report: RoundReport, account: PrivacyAccount
) -> dict[str, Any]:
    """Return a round's line of metrics.jsonl.

    Counts of clients are null if cohorts are secret.
    """
    known, stats, clients = not config.cohorts_are_secret, report.stats, report.clients
    server_round = report.server_round
    rate = cosine(
        config.train.learning_rate,
        config.train.learning_rate_min,
        server_round,
        config.num_server_rounds,
    )
    client_seconds = {
        phase: round(value / stats.num_timed, 3)
        for phase, value in stats.client_seconds.items()
    }
    return {
        "server_round": server_round,
        "clients_asked": stats.asked if known else None,
        "clients_answered": stats.answered if known else None,
        "clients_late": stats.late if known else None,
        "clients_rejected": len(stats.rejected) if known else None,
        "train_loss": stats.train_loss,
        "validation_loss": report.loss,
        # The base rewards nothing, so it prefers none.
        "pairs_preferred": (
            report.pairs.preferred if report.pairs and server_round else None
        ),
        "pairs_likelier": report.pairs.likelier if report.pairs else None,
        "client_loss": clients.get("client-loss"),
        "client_loss_best": clients.get("client-loss-best"),
        "client_loss_worst": clients.get("client-loss-worst"),
        "clients_evaluated": clients.get("clients-evaluated"),
        "seconds": {
            phase: None if value is None else round(value, 3)
            for phase, value in report.seconds.items()
        },
        "client_seconds": client_seconds or None,
        "megabytes_down": stats.bytes_down / 1e6 if known else None,
        "megabytes_up": stats.bytes_up / 1e6 if known else None,
        "epsilon": account.epsilon(server_round),
        "learning_rate": rate if server_round else None,
    }


def log_round(config: RunConfig, report: RoundReport, account: PrivacyAccount) -> None:
    """Log a round in one line, without counts and times if cohorts are secret."""
    known, stats, clients = not config.cohorts_are_secret, report.stats, report.clients
    parts = [f"round {report.server_round}/{config.num_server_rounds}"]
    if known:
        late = f" (late ones: {stats.late})" if stats.late else ""
        parts.append(f"{stats.usable} of {stats.asked} clients{late}")
    if stats.train_loss is not None:
        parts.append(f"train loss {stats.train_loss:.3f}")
    if clients:
        parts.append(
            f"client loss {clients['client-loss']:.3f} (best "
            f"{clients['client-loss-best']:.3f}, worst "
            f"{clients['client-loss-worst']:.3f} of {clients['clients-evaluated']})"
        )
    if report.loss is not None:
        parts.append(f"validation loss {report.loss:.3f}{pairs_text(report)}")
    if (epsilon := account.epsilon_text()) is not None:
        parts.append(epsilon)
    if known:
        parts.append(f"{report.total_seconds:.0f} s")
    logger.info("%s", ", ".join(parts))


def pairs_text(report: RoundReport) -> str:
    """Return what the validation loss says in shares of pairs; empty if they are none."""
    pairs = report.pairs
    if pairs is None or pairs.preferred is None or pairs.likelier is None:
        return ""
    likelier = f"in {pairs.likelier:.0%} the chosen answer is the likelier one"
    if not report.server_round:
        return f" ({likelier})"
    return f" ({pairs.preferred:.0%} of pairs preferred as chosen; {likelier})"


def log_failures(config: RunConfig, server_round: int, stats: Round) -> None:
    """Log why replies had no usable update: text without DP, codes under DP.

    If cohorts are secret it logs nothing: a failure shows that a client was asked.
    """
    if config.cohorts_are_secret:
        return
    for node_id, code, text in stats.rejected:
        logger.warning(
            "round %d: node %s: no usable update (code %s)%s",
            server_round,
            short_name(node_id),
            code,
            f": {text}" if text else where_to_look(code),
        )
    missing = stats.asked - (stats.answered - stats.late)
    if not missing:
        return
    if stats.usable >= config.strategy.min_replies > 0:
        when = f"before strategy.min-replies {config.strategy.min_replies} had"
    else:
        when = f"within strategy.round-timeout {config.strategy.round_timeout:g} s"
    is_kept = config.strategy.late_replies == "next-round"
    logger.warning(
        "round %d: %d clients did not answer %s and count %s",
        server_round,
        missing,
        when,
        "later, if they do" if is_kept else "as zero",
    )


def require_training(trained: bool, failures: Counter[str]) -> None:
    """Fail a run that trained nothing.

    Raises:
        FederationError: No client ever returned a usable update; names the causes.
    """
    if trained:
        return
    causes = ", ".join(f"{text} ({n} times)" for text, n in failures.most_common(3))
    raise FederationError(
        "no client ever returned a usable update, so nothing was trained: "
        f"{causes or 'no client answered in time'}; each client's own log "
        "(logs/client-<partition>.log under its ~/.fedllm) has its side of it"
    )


def where_to_look(code: str) -> str:
    """Return whose log has the reason why an update came to nothing."""
    if code in ERROR_CODES:
        return (
            "; the client failed, and its own log has the reason if it could write "
            "one: logs/client-<partition>.log under its ~/.fedllm"
        )
    if code == OTHER_VERSION:
        return (
            f"; its fedllm does not write wire format {WIRE_FORMAT}: install the server's "
            "version there"
        )
    if code == NOT_OPENED:
        return "; the trustees did not open the round, and its updates are lost"
    return "; the server rejected the reply, and the client's log need not explain it"
