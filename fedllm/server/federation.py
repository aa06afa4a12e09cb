"""The run: who is there, what is promised, the rounds, and what came of it.

Our own loop over Flower's Grid, since `Strategy.start` counts from round 1, cannot stop
early and loses its result when anything raises.
"""

import logging
import platform
import time
from collections import Counter
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

from flwr.app import ConfigRecord
from flwr.serverapp import Grid

from fedllm.adapters.peft_model import initial_arrays
from fedllm.adapters.resolve import adapter_spec
from fedllm.adapters.spec import AdapterSpec, Arrays
from fedllm.config import RunConfig, fedllm_home, flat
from fedllm.errors import FederationError
from fedllm.evaluation.public_rows import PublicRows
from fedllm.evaluation.sample_answers import sample_answers
from fedllm.planning.adapter_choice import choose_adapter, with_choice
from fedllm.planning.noise import privacy_settings
from fedllm.planning.record_noise import record_settings
from fedllm.privacy.ledger import Ledger, no_privacy
from fedllm.privacy.record_claims import RecordClaims
from fedllm.privacy.wording import plain
from fedllm.reporting.monitor import RunMonitor, noting_failure
from fedllm.reporting.trackers import require_tracker
from fedllm.runs.checkpoint import Checkpoint, State, require_unchanged, spec_as_json
from fedllm.runs.directory import (
    CONFIG_FILE,
    PRIVACY_FILE,
    RESULT_FILE,
    RunDirectory,
    read_json,
)
from fedllm.runs.record import ANSWERS_FILE
from fedllm.runs.resume import open_run
from fedllm.server.noise_probe import measure_noise_alone
from fedllm.server.population import replace_departed, wait_for_clients
from fedllm.server.reply_stream import ReplyStream
from fedllm.server.round_log import where_to_look
from fedllm.server.saving import BestRound
from fedllm.server.startup import PACKAGES
from fedllm.server.summary import log_outcome, log_privacy_plan, log_record_plan
from fedllm.strategy.build import make_strategy
from fedllm.strategy.client_level_dp import ClientLevelDP
from fedllm.strategy.fedavg import AdapterFedAvg
from fedllm.strategy.round_stats import Round
from fedllm.strategy.server_optimizer import cosine
from fedllm.wire.messages import ADAPTER_KIND, array_record, read_global
from fedllm.wire.resumed_run import ORIGINAL_RUN, original_run

logger = logging.getLogger(__name__)


class Federation:
    """One run of a federation.

    Args:
        config: The run config.
        grid: Flower's way to the clients.
        run_id: Flower's id of the run.
    """

    @noting_failure
    def __init__(self, config: RunConfig, grid: Grid, run_id: int) -> None:
        from fedllm.models.loading import fingerprint, load_config, locate

        require_tracker(config.output.tracker)
        home = fedllm_home()
        resumed = open_run(config, home) if config.resume.from_ else None
        if resumed is not None:
            config, self.directory = resumed.config, resumed.directory
            run_id = resumed.checkpoint.state.run_id
        else:
            self.directory = RunDirectory.create(home, run_id)
            self.directory.lock()
        self.config = config
        self.grid = grid
        self.run_id = run_id
        self.resumed = resumed is not None
        self._run_name = (
            resumed.checkpoint.state.run if resumed else self.directory.path.name
        )
        logger.info("run folder: %s", self.directory.path)
        unit, sampling = config.privacy.unit, config.strategy.sampling
        secret = unit == "client" and sampling == "poisson"
        self.watch = RunMonitor(self.directory.path, config.output.tracker, secret)
        self.base_name = locate(config.model.name, home)
        model_config = load_config(self.base_name)
        if config.adapter.kind != "auto":
            # Whatever is wrong with it is said before anybody is waited for.
            adapter_spec(config.adapter, model_config, config.seed)
        known = resumed.checkpoint.state.population if resumed else []
        self.population = wait_for_clients(grid, config, known)
        if config.adapter.kind == "auto":
            choice = choose_adapter(config, len(self.population))
            logger.info("adapter.kind auto: %s; %s", choice.kind, choice.reason)
            config = self.config = with_choice(config, choice)
            if choice.measured is not None:
                logger.info(
                    "adapter.kind auto: clipping norm %g and server learning rate %g to "
                    "%g, as measured with this kind",
                    config.privacy.clipping_norm,
                    config.strategy.server_learning_rate,
                    config.strategy.server_learning_rate_min,
                )
        self.spec: AdapterSpec = adapter_spec(config.adapter, model_config, config.seed)
        self._fingerprint = fingerprint(self.base_name)
        if resumed is not None:
            resumed.checkpoint.state.check_model(self._fingerprint, self.spec)
        self.public = PublicRows(config, home)
        self.best: BestRound | None = None
        self.last_round = 0
        self.next_round = 1
        self.trained = False
        self._failures: Counter[str] = Counter()
        self.ledger: Ledger | None = None
        self.records: RecordClaims | None = None
        self._open_privacy()
        self.arrays: Arrays = initial_arrays(self.spec)
        if resumed is not None:
            self.arrays = resumed.checkpoint.arrays
        self.strategy = make_strategy(config, self.arrays, self.population, self.ledger)
        if resumed is not None:
            self._go_on(resumed.checkpoint)
        else:
            self.directory.write_json(CONFIG_FILE, self._resolved())

    @noting_failure
    def run(self) -> dict[str, Any]:
        """Train, save and report.

        Returns:
            The content of result.json.

        Raises:
            FederationError: No client ever returned a usable update.
            PrivacyError: Noise alone does harm and the run was told to refuse.
        """
        try:
            if not self.resumed:
                self._prepare()
            self._train()
            self._require_training()
            return self._finish()
        finally:
            self.directory.unlock()

    def _open_privacy(self) -> None:
        """Start what counts the privacy spent, or read back what was.

        Raises:
            ConfigError: The run began with privacy, and its config has none.
            PrivacyError: It cannot be trusted, or is of other settings.
        """
        config, size, d = self.config, len(self.population), self.spec.num_trainable
        path, run = self.directory.path / PRIVACY_FILE, self._run_name
        if config.privacy.unit == "client":
            settings = privacy_settings(config, size, d)
            if self.resumed:
                self.ledger = Ledger.load(path)
                self.ledger.check_same(settings)
            else:
                self.ledger = Ledger.create(path, settings, run)
        elif config.privacy.unit == "record":
            promised = record_settings(config, size, d)
            if self.resumed:
                self.records = RecordClaims.load(path, promised)
            else:
                self.records = RecordClaims.create(path, promised, run)
        elif self.resumed:
            began = {"privacy.unit": read_json(path).get("unit")}
            now = {"privacy.unit": "none"}
            require_unchanged(
                began, now, "resume.from: the run's ledger and config differ"
            )
        else:
            self.directory.write_json(PRIVACY_FILE, no_privacy(size, d, run))

    def _go_on(self, checkpoint: Checkpoint) -> None:
        """Take up a run where its checkpoint left it.

        Raises:
            PrivacyError: The ledger forgets what the checkpoint knows.
            FederationError: No round is left, and none was finished.
        """
        state, account = checkpoint.state, self.ledger or self.records
        if account is not None:
            self.next_round = state.round_after(account.run, account.releases)
        else:
            self.next_round = state.server_round + 1
        state.say(self.next_round, self.config.num_server_rounds)
        self.last_round, self.trained = state.server_round, state.trained
        self._failures.update(state.failures)
        self._averaging.optimizer.restore(checkpoint.moments)
        if state.best_round is not None and state.best_loss is not None:
            self.best = BestRound(state.best_round, state.best_loss, checkpoint.best)
        self._restore_folder()

    def _restore_folder(self) -> None:
        """Make the run folder what it was after the last finished round."""
        self.directory.go_back(self.last_round)
        if self.last_round:
            self._save_adapter(self.last_round, self.arrays)
        if self.best is not None and self.best.server_round:
            self._save_adapter(self.best.server_round, self.best.arrays)
            self.directory.copy_adapter(self.best.server_round, "peft_best")
        self.directory.be_latest()

    @property
    def _averaging(self) -> AdapterFedAvg:
        """The strategy under the privacy, if there is any."""
        if isinstance(self.strategy, ClientLevelDP):
            return self.strategy.strategy
        return self.strategy

    def _write_checkpoint(self) -> None:
        """Keep what the next round starts from, once this one is paid for and saved."""
        account = self.ledger or self.records
        state = State(
            run=self._run_name,
            run_id=self.run_id,
            server_round=self.last_round,
            releases=account.releases if account is not None else [],
            population=self.population,
            trained=self.trained,
            # How many failed tells how many were asked.
            failures=dict(self._failures) if self._may_count() else {},
            best_round=self.best.server_round if self.best else None,
            best_loss=self.best.loss if self.best else None,
            base=self._fingerprint,
            adapter=spec_as_json(self.spec),
        )
        best = self.best.arrays if self.best else {}
        moments = self._averaging.optimizer.moments
        Checkpoint(state, self.arrays, best, moments).write(self.directory)

    def _prepare(self) -> None:
        """Score the untuned model, and say what is promised, before round 1."""
        self._evaluate_base()
        if isinstance(self.strategy, ClientLevelDP):
            log_privacy_plan(self.strategy.ledger)
            if self.config.privacy.noise_probe and self.best is not None:
                measure_noise_alone(self.strategy, self.public, self.best.loss)
        if self.records is not None:
            log_record_plan(self.records.settings)
        self._write_checkpoint()

    def _train(self) -> None:
        """Run the rounds that are left, while there is budget."""
        for server_round in range(self.next_round, self.config.num_server_rounds + 1):
            limit = self.config.privacy.max_epsilon
            if self.ledger is not None and not self.ledger.may_spend(limit):
                logger.info(
                    "round %d would pass privacy.max-epsilon %g: training stops here, "
                    "and the adapter of round %d is kept",
                    server_round,
                    limit,
                    self.last_round,
                )
                break
            self._run_round(server_round)
            if self.records is not None and self.strategy.round.all_spent:
                logger.info(
                    "round %d: every client has spent its budget: training stops here",
                    server_round,
                )
                break
        if self.last_round and not self._is_due(self.last_round):
            self._keep_best(self.last_round, self.public.validation_loss(self.arrays))

    def _run_round(self, server_round: int) -> None:
        """Send, gather, aggregate, evaluate, save, and say so in one line."""
        config = self.config
        started = time.monotonic()
        self.population = replace_departed(
            self.population, set(self.grid.get_node_ids())
        )
        self._averaging.population = self.population
        messages = list(
            self.strategy.configure_train(
                server_round, array_record(self.arrays), self._instructions(), self.grid
            )
        )
        waiting = ReplyStream(self.grid, messages, config.strategy.round_timeout)
        waiting.describe(server_round, config.num_server_rounds, self._may_count())
        record, _ = self.strategy.aggregate_train(server_round, waiting)
        gathered = time.monotonic()
        seen = self.strategy.round
        self._note_failures(server_round, seen)
        if self.records is not None:
            self.records.note_round(server_round, seen.epsilons, self.population)
        may_be_empty = config.strategy.sampling == "poisson" and self.records is None
        if seen.usable > 0 or may_be_empty:
            self.trained = True
        if record is not None:
            self.arrays = read_global(record, self.spec.trained_shapes)
        clients = self._evaluate_clients(server_round)
        loss = self._validate(server_round)
        evaluated = time.monotonic()
        self._save(server_round, loss)
        self.last_round = server_round
        done = time.monotonic()
        # How long a cohort takes tells how many it has.
        known = self._may_count()
        seconds = {
            "train": waiting.seconds if known else None,
            "aggregate": gathered - started - waiting.seconds if known else None,
            "evaluate": evaluated - gathered,
            # The page of the round before was drawn after that round's line.
            "save": done - evaluated + self.watch.take_seconds(),
        }
        self._write_line(server_round, seen, loss, clients, seconds)
        self._write_checkpoint()
        parts = [f"round {server_round}/{config.num_server_rounds}"]
        if known:
            parts.append(f"{seen.usable} of {seen.asked} clients")
        if seen.train_loss is not None:
            parts.append(f"train loss {seen.train_loss:.3f}")
        if clients:
            parts.append(
                f"client loss {clients['client-loss']:.3f} (best "
                f"{clients['client-loss-best']:.3f}, worst "
                f"{clients['client-loss-worst']:.3f} of {clients['clients-evaluated']})"
            )
        if loss is not None:
            parts.append(f"validation loss {loss:.3f}")
        if self.ledger is not None:
            parts.append(f"epsilon {plain(self.ledger.epsilons().zero_out)}")
        if self.records is not None:
            parts.append(f"epsilon {plain(self.records.worst)} (worst client)")
        if known:
            parts.append(f"{done - started:.0f} s")
        logger.info("%s", ", ".join(parts))

    def _instructions(self) -> ConfigRecord:
        """Return what every message says besides its round: adapter, and run if resumed."""
        said = ConfigRecord({ADAPTER_KIND: self.spec.kind})
        if self.resumed:
            said[ORIGINAL_RUN] = original_run(self.config, self.run_id)
        return said

    def _evaluate_base(self) -> None:
        """Measure the untuned model, which is round 0."""
        started = time.monotonic()
        loss = self.public.validation_loss(self.arrays)
        if loss is not None:
            self.best = BestRound(0, loss, self.arrays)
            logger.info("round 0, the untuned model: validation loss %.3f", loss)
        seconds: dict[str, float | None] = {"train": 0.0, "aggregate": 0.0, "save": 0.0}
        seconds["evaluate"] = time.monotonic() - started
        self._write_line(0, Round(), loss, {}, seconds)

    def _validate(self, server_round: int) -> float | None:
        """Measure the adapter on public validation rows, where it is due."""
        if not self._is_due(server_round):
            return None
        return self.public.validation_loss(self.arrays)

    def _is_due(self, server_round: int) -> bool:
        """Tell whether a round's adapter is scored on public rows."""
        last = server_round == self.config.num_server_rounds
        return last or server_round % self.config.strategy.evaluate_every == 0

    def _evaluate_clients(self, server_round: int) -> Mapping[str, Any]:
        """Ask clients for the loss on their held-out rows; without DP only."""
        messages = list(
            self.strategy.configure_evaluate(
                server_round, array_record(self.arrays), self._instructions(), self.grid
            )
        )
        if not messages:
            return {}
        timeout = self.config.strategy.round_timeout
        gathering = ReplyStream(self.grid, messages, timeout)
        metrics = self.strategy.aggregate_evaluate(server_round, gathering)
        if metrics is None:
            logger.warning(
                "round %d: none of %d clients had a loss of its held-out rows to tell; "
                "see each client's own log",
                server_round,
                len(messages),
            )
        return metrics or {}

    def _save(self, server_round: int, loss: float | None) -> None:
        """Save the round where it is due, is the last, or is the best so far."""
        previous = self.last_round
        if (
            previous
            and previous % self.config.output.save_every
            and not (self.best is not None and self.best.server_round == previous)
        ):
            self.directory.drop_round(previous)
        self._save_adapter(server_round, self.arrays)
        self._keep_best(server_round, loss)

    def _save_adapter(self, server_round: int, arrays: Arrays) -> None:
        """Write `peft_<round>/`."""
        self.directory.save_round(
            server_round, self.spec, arrays, self.base_name, self._origin()
        )

    def _keep_best(self, server_round: int, loss: float | None) -> None:
        """Make a round the best one, if its loss is the lowest."""
        if loss is not None and self.best is not None and loss < self.best.loss:
            self.best = BestRound(server_round, loss, self.arrays)
            self.directory.copy_adapter(server_round, "peft_best")

    def _finish(self) -> dict[str, Any]:
        """Test, recommend, and say what the run was worth."""
        final = self.directory.copy_adapter(self.last_round, "peft_final")
        recommended, arrays = str(final), self.arrays
        if self.best is not None:
            best = str(self.directory.path / "peft_best")
            recommended = best if self.best.server_round > 0 else "base"
            arrays = self.best.arrays
        before = self.public.test_loss(initial_arrays(self.spec))
        after = self.public.test_loss(arrays)
        result = {
            "recommended": recommended,
            "num_rounds": self.last_round,
            "best_round": self.best.server_round if self.best else None,
            "test_loss_before": before.loss if before else None,
            "test_loss_after": after.loss if after else None,
            "test_examples": before.num_examples if before else 0,
        }
        self.directory.write_json(RESULT_FILE, result)
        tuned, tuned_round = self.arrays, self.last_round
        if result["best_round"] and self.best is not None:
            tuned, tuned_round = self.best.arrays, self.best.server_round
        base = initial_arrays(self.spec)
        answers = sample_answers(self.public, base, tuned, tuned_round)
        if answers is not None:
            self.directory.write_json(ANSWERS_FILE, answers)
        self.watch.finish()
        log_outcome(result, self.ledger or self.records, self.directory.path)
        return result

    def _may_count(self) -> bool:
        """Tell whether numbers of clients may be said: not under secret cohorts."""
        return self.ledger is None or self.config.strategy.sampling != "poisson"

    def _note_failures(self, server_round: int, seen: Round) -> None:
        """Show why replies had no usable update: text without DP, codes under DP."""
        self._failures.update(text or code for _, code, text in seen.rejected)
        if not self._may_count():
            return
        for node_id, code, text in seen.rejected:
            logger.warning(
                "round %d: node %d: no usable update (code %s)%s",
                server_round,
                node_id,
                code,
                f": {text}" if text else where_to_look(code),
            )
        missing = seen.asked - seen.answered
        if missing:
            logger.warning(
                "round %d: %d clients did not answer within strategy.round-timeout "
                "%g s and count as zero",
                server_round,
                missing,
                self.config.strategy.round_timeout,
            )

    def _require_training(self) -> None:
        """Fail a run that trained nothing."""
        if self.trained:
            return
        causes = ", ".join(
            f"{text} ({n} times)" for text, n in self._failures.most_common(3)
        )
        raise FederationError(
            "no client ever returned a usable update, so nothing was trained: "
            f"{causes or 'no client answered in time'}; each client's own log "
            "(logs/client-<partition>.log under its ~/.fedllm) has its side of it"
        )

    def _write_line(
        self,
        server_round: int,
        seen: Round,
        loss: float | None,
        clients: Mapping[str, Any],
        seconds: Mapping[str, float | None],
    ) -> None:
        """Append a line to metrics.jsonl."""
        known = self._may_count()
        train = self.config.train
        rate = cosine(
            train.learning_rate,
            train.learning_rate_min,
            server_round,
            self.config.num_server_rounds,
        )
        epsilon: float | None = None
        if self.ledger is not None:
            epsilon = self.ledger.epsilons().zero_out if server_round else 0.0
        if self.records is not None:
            epsilon = self.records.worst if server_round else 0.0
        line = {
            "server_round": server_round,
            "clients_asked": seen.asked if known else None,
            "clients_answered": seen.answered if known else None,
            "clients_rejected": len(seen.rejected) if known else None,
            "train_loss": seen.train_loss,
            "validation_loss": loss,
            "client_loss": clients.get("client-loss"),
            "client_loss_best": clients.get("client-loss-best"),
            "client_loss_worst": clients.get("client-loss-worst"),
            "clients_evaluated": clients.get("clients-evaluated"),
            "seconds": {
                phase: None if value is None else round(value, 3)
                for phase, value in seconds.items()
            },
            "client_seconds": (
                {
                    phase: round(value / seen.num_timed, 3)
                    for phase, value in seen.client_seconds.items()
                }
                or None
            ),
            "megabytes_down": seen.bytes_down / 1e6 if known else None,
            "megabytes_up": seen.bytes_up / 1e6 if known else None,
            "epsilon": epsilon,
            "learning_rate": rate if server_round else None,
        }
        self.directory.add_metrics(line)
        self.watch.note(line)

    def _origin(self) -> dict[str, Any]:
        """Return what an adapter folder says of itself."""
        return {
            "model": self.config.model.name,
            "quantization": self.config.model.quantization,
            "num_clients": len(self.population),
            "run": str(self.directory.path),
        }

    def _resolved(self) -> dict[str, Any]:
        """Return everything that the run was told and found."""
        return {
            "run_config": flat(self.config),
            "num_clients": len(self.population),
            "base": self.base_name,
            "num_trainable": self.spec.num_trainable,
            "versions": {
                "python": platform.python_version(),
                **{name: version(name) for name in PACKAGES},
            },
        }
