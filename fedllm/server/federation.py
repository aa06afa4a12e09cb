"""The rounds of one run, in order, and its end.

Our own loop over Flower's Grid, since `Strategy.start` counts from round 1, cannot stop
early and loses its result if anything raises.
"""

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from flwr.app import ConfigRecord
from flwr.serverapp import Grid

from fedllm.adapters.peft_model import initial_arrays
from fedllm.adapters.spec import AdapterSpec, Arrays
from fedllm.config import RunConfig, fedllm_home
from fedllm.evaluation.held_out_loss import HeldOut
from fedllm.evaluation.public_rows import PublicRows
from fedllm.evaluation.sample_answers import sample_answers
from fedllm.reporting.monitor import RunMonitor
from fedllm.runs.directory import RESULT_FILE, RunDirectory
from fedllm.runs.record import ANSWERS_FILE
from fedllm.server.account import PrivacyAccount
from fedllm.server.announcement import announce
from fedllm.server.delivery import deliver
from fedllm.server.late_replies import LateReplies
from fedllm.server.ledger_head import HeadSigner
from fedllm.server.noise_probe import require_harmless_noise
from fedllm.server.population import present_population, replace_departed
from fedllm.server.reply_stream import ReplyStream
from fedllm.server.round_log import (
    RoundReport,
    log_failures,
    log_round,
    metrics_line,
    pairs_text,
    require_training,
)
from fedllm.server.saving import BestRound, Progress, RunSaver
from fedllm.server.summary import log_judges, log_outcome, log_plan
from fedllm.server.trustees import SealedNodes
from fedllm.strategy.client_level_dp import ClientLevelDP
from fedllm.strategy.fedavg import AdapterFedAvg
from fedllm.strategy.joint_record_dp import JointRecordDP
from fedllm.strategy.sealed_dp import SealedDP
from fedllm.strategy.sealed_record_dp import SealedRecordDP
from fedllm.wire.messages import (
    ADAPTER_KIND,
    BASE_MODEL,
    array_record,
    read_global,
)
from fedllm.wire.resumed_run import ORIGINAL_RUN, original_run

logger = logging.getLogger(__name__)


@dataclass(eq=False, repr=False)
class Federation:
    """One run, ready to train. `fedllm.server.startup.set_up` makes it.

    Attributes:
        config: The run config, with `adapter.kind` resolved.
        grid: Flower's way to the clients.
        run_id: Flower's id of the run when it began.
        resumed: Whether the run was begun before.
        population: Node ids of all clients.
        spec: The adapter.
        base_digest: What the clients compare their base model with.
        directory: The run folder, locked.
        public: Scores adapters on public rows.
        account: What was spent.
        strategy: Makes messages, and the next adapter from replies.
        saver: Writes adapters and checkpoints.
        monitor: Shows the run while it runs.
        progress: How far the run has come.
        heads: Signs the ledger's end for the nodes.
        late: The messages of earlier rounds whose replies still count.
        sealed: The nodes of a sealed run; None otherwise.
    """

    config: RunConfig
    grid: Grid
    run_id: int
    resumed: bool
    population: list[int]
    spec: AdapterSpec
    base_digest: str
    directory: RunDirectory
    public: PublicRows
    account: PrivacyAccount
    strategy: AdapterFedAvg | ClientLevelDP | JointRecordDP | SealedDP | SealedRecordDP
    saver: RunSaver
    monitor: RunMonitor
    progress: Progress
    heads: HeadSigner
    sealed: SealedNodes | None = None
    late: LateReplies = field(init=False)

    def __post_init__(self) -> None:
        self.late = LateReplies(self.config)

    def run(self) -> dict[str, Any]:
        """Train, save and report.

        Returns:
            The content of result.json.

        Raises:
            FederationError: No client ever returned a usable update, or every one refuses
                the run.
            PrivacyError: Noise alone is destructive, and the settings do not allow that.
        """
        try:
            with self.monitor.showing_failure():
                if not self.resumed:
                    self._prepare()
                self._train()
                require_training(self.progress.trained, self.progress.failures)
                result = self._finish()
            if self.config.is_personal:
                self._deliver()
            return result
        finally:
            self.directory.unlock()

    def _prepare(self) -> None:
        """Score what the run starts from, and log what the run will spend, before round 1."""
        began = time.monotonic()
        loss = self.public.validation_loss(self.progress.arrays)
        if loss is not None:
            self.progress.best = BestRound(0, loss, self.progress.arrays)
            is_tuned = self.config.starts_tuned
            what = "the start adapter" if is_tuned else "the untuned model"
            pairs = pairs_text(RoundReport(0, pairs=self._pairs()))
            logger.info("round 0, %s: validation loss %.3f%s", what, loss, pairs)
            if is_tuned:
                self.saver.save_start(self.progress, len(self.population))
        evaluated = time.monotonic() - began
        seconds = {"train": 0.0, "aggregate": 0.0, "save": 0.0, "evaluate": evaluated}
        report = RoundReport(0, loss=loss, pairs=self._pairs(), seconds=seconds)
        self._record(report)
        log_plan(self.account)
        if loss is not None and not isinstance(self.strategy, AdapterFedAvg):
            advice = self.account.advice()
            require_harmless_noise(
                self.config, self.strategy, self.public, loss, advice
            )
        self._write_checkpoint()

    def _train(self) -> None:
        """Run the rounds that are left, while there is budget."""
        progress = self.progress
        if self.config.cohorts_are_secret:
            announce(self.config, self.grid, self.population, self._instructions())
        for server_round in range(
            progress.next_round, self.config.num_server_rounds + 1
        ):
            if not self.account.may_start(server_round, progress.last_round):
                break
            self._run_round(server_round)
            if self.account.is_exhausted(server_round, self.strategy.round):
                break
        last = progress.last_round
        if last and not self._is_due(last):
            loss = self.public.validation_loss(progress.arrays)
            self.saver.keep_best(progress, last, loss)

    def _run_round(self, server_round: int) -> None:
        """Send, receive, aggregate, evaluate, save and log one round."""
        config, progress = self.config, self.progress
        started = time.monotonic()
        self._update_population()
        replies = self._ask(server_round)
        record, _ = self.strategy.aggregate_train(server_round, replies)
        self.late.end_round(replies)
        aggregated = time.monotonic()
        stats = self.strategy.round
        log_failures(config, server_round, stats)
        progress.failures.update(text or code for _, code, text in stats.rejected)
        self.account.note_round(server_round, stats, self.population)
        if stats.usable > 0 or config.cohorts_may_be_empty:
            progress.trained = True
        if record is not None:
            progress.arrays = read_global(record, self.spec.trained_shapes)
        clients = self._evaluate_clients(server_round)
        loss = self._validate(server_round)
        evaluated = time.monotonic()
        self.saver.save_round(progress, server_round, loss, len(self.population))
        progress.last_round = server_round
        done = time.monotonic()
        # How long a cohort takes depends on how many it has.
        known = not config.cohorts_are_secret
        seconds = {
            "train": replies.seconds if known else None,
            "aggregate": aggregated - started - replies.seconds if known else None,
            "evaluate": evaluated - aggregated,
            # The page of the round before was drawn after that round's line.
            "save": done - evaluated + self.monitor.take_seconds(),
        }
        report = RoundReport(
            *(server_round, stats, loss, self._pairs(), clients, seconds),
            total_seconds=done - started,
        )
        self._record(report)
        self._write_checkpoint()
        log_round(config, report, self.account)

    def _update_population(self) -> None:
        """Take up who joined or left; under DP the population stays what was promised."""
        before = self.population
        connected = (
            set(self.grid.get_node_ids())
            if self.sealed is None
            else self.sealed.greet()
        )
        if self.config.privacy.unit == "none":
            most = self.config.strategy.num_clients
            self.population = present_population(before, connected, most)
        else:
            self.population = replace_departed(before, connected)
        self.strategy.averaging.population = self.population
        self.late.begin_round(before, self.population)
        self.strategy.averaging.expect_late(self.late.messages)

    def _ask(self, server_round: int) -> ReplyStream:
        """Send the round's messages and return the stream of replies."""
        messages = list(
            self.strategy.configure_train(
                server_round,
                array_record(self.progress.arrays),
                self._instructions(),
                self.grid,
            )
        )
        enough, strategy = self.config.strategy.min_replies, self.strategy
        replies = self.late.stream(
            self.grid, messages, lambda: 0 < enough <= strategy.round.usable
        )
        if not self.config.cohorts_are_secret:
            replies.show_progress(server_round, self.config.num_server_rounds)
        return replies

    def _instructions(self) -> ConfigRecord:
        """Return what every message holds besides its round."""
        record = instructions_of(
            self.config, self.run_id, self.spec, self.base_digest, self.resumed
        )
        return ConfigRecord({**record, **self.heads.entries(self.account.head)})

    def _evaluate_clients(self, server_round: int) -> Mapping[str, Any]:
        """Return the clients' losses on their held-out rows; empty under DP."""
        messages = list(
            self.strategy.configure_evaluate(
                server_round,
                array_record(self.progress.arrays),
                self._instructions(),
                self.grid,
            )
        )
        if not messages:
            return {}
        replies = ReplyStream(self.grid, messages, self.config.strategy.round_timeout)
        metrics = self.strategy.aggregate_evaluate(server_round, replies)
        if metrics is None:
            logger.warning(
                "round %d: none of %d clients returned a loss of its held-out rows; see "
                "each client's own log",
                server_round,
                len(messages),
            )
        return metrics or {}

    def _validate(self, server_round: int) -> float | None:
        """Return the adapter's loss on public validation rows, if it is due."""
        if not self._is_due(server_round):
            return None
        return self.public.validation_loss(self.progress.arrays)

    def _pairs(self) -> HeldOut | None:
        """Return what the adapter makes of public pairs, if it was just scored on such."""
        return self.public.validation_pairs(self.progress.arrays)

    def _is_due(self, server_round: int) -> bool:
        """Return whether a round's adapter is scored on public rows."""
        last = server_round == self.config.num_server_rounds
        return last or server_round % self.config.strategy.evaluate_every == 0

    def _record(self, report: RoundReport) -> None:
        """Append a round to metrics.jsonl and show it."""
        line = metrics_line(self.config, report, self.account)
        self.directory.add_metrics(line)
        self.monitor.note(line)

    def _write_checkpoint(self) -> None:
        """Write what the next round starts from."""
        moments = self.strategy.averaging.optimizer.moments
        self.saver.write_checkpoint(
            self.progress, self.account, self.population, moments
        )

    def _finish(self) -> dict[str, Any]:
        """Score the recommended adapter on test rows, and log the outcome."""
        progress, best = self.progress, self.progress.best
        final = self.directory.copy_adapter(progress.last_round, "peft_final")
        base = initial_arrays(self.spec)
        recommended, arrays = str(final), progress.arrays
        if best is not None:
            folder = str(self.directory.path / "peft_best")
            is_tuned = best.server_round > 0 or self.config.starts_tuned
            recommended = folder if is_tuned else "base"
            arrays = best.arrays
        before = self.public.test_loss(base)
        after = self.public.test_loss(arrays)
        result = {
            "recommended": recommended,
            "num_rounds": progress.last_round,
            "best_round": best.server_round if best else None,
            "test_loss_before": before.loss if before else None,
            "test_loss_after": after.loss if after else None,
            "test_examples": before.num_examples if before else 0,
            "test_pairs_likelier_before": before.likelier if before else None,
            "test_pairs_likelier_after": after.likelier if after else None,
            "test_pairs_preferred": after.preferred if after else None,
        }
        self.directory.write_json(RESULT_FILE, result)
        self._write_answers(base)
        self.monitor.finish()
        if self.sealed is not None:
            self.sealed.end(fedllm_home())
        log_outcome(result, self.account, self.directory.path)
        log_judges(self.config, self.grid)
        return result

    def _deliver(self) -> None:
        """Bring every client the best tuned adapter, for its personal training."""
        tuned, _ = self._best_tuned()
        deliver(
            self.strategy.averaging,
            self.grid,
            array_record(tuned),
            self._instructions(),
        )

    def _best_tuned(self) -> tuple[Arrays, int]:
        """Return the adapter of the best round but the untuned one, and its round."""
        progress, best = self.progress, self.progress.best
        if best is not None and (best.server_round or self.config.starts_tuned):
            return best.arrays, best.server_round
        return progress.arrays, progress.last_round

    def _write_answers(self, base: Arrays) -> None:
        """Write sample answers of the base and of the best tuned round."""
        tuned, server_round = self._best_tuned()
        answers = sample_answers(self.public, base, tuned, server_round)
        if answers is not None:
            self.directory.write_json(ANSWERS_FILE, answers)


def instructions_of(
    config: RunConfig, run_id: int, spec: AdapterSpec, base_digest: str, resumed: bool
) -> ConfigRecord:
    """Return what every message of a run holds besides its round.

    That is the adapter's kind, the base model's digest, and the original run's settings if it
    was resumed.

    Args:
        config: The settings that the run began with.
        run_id: Flower's id of the run when it began.
        spec: The adapter.
        base_digest: What the clients compare their base model with.
        resumed: Whether the run was begun before.
    """
    record = first_instructions(config, run_id, base_digest, resumed)
    record[ADAPTER_KIND] = spec.kind
    return record


def first_instructions(
    config: RunConfig, run_id: int, base_digest: str, resumed: bool
) -> ConfigRecord:
    """Return what a message holds before the adapter's kind is chosen; arguments as above."""
    record = ConfigRecord({BASE_MODEL: base_digest})
    if resumed:
        record[ORIGINAL_RUN] = original_run(config, run_id)
    return record
