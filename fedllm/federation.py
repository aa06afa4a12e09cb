"""The run: who is there, what is promised, the rounds, and what came of it.

Our own loop over Flower's Grid, since `Strategy.start` counts from round 1, cannot stop
early and loses its result when anything raises.
"""

import logging
import platform
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from flwr.app import ConfigRecord, Message
from flwr.serverapp import Grid

from fedllm.adapters import AdapterSpec, Arrays, adapter_spec, initial_arrays
from fedllm.config import RunConfig, fedllm_home, flat
from fedllm.errors import FederationError, PrivacyError
from fedllm.privacy.accounting import calibrate, default_delta
from fedllm.privacy.ledger import Ledger, PrivacySettings, no_privacy
from fedllm.privacy.planning import noise_to_signal
from fedllm.public_rows import PublicRows
from fedllm.replies import array_record, read_global
from fedllm.run_directory import (
    CONFIG_FILE,
    PRIVACY_FILE,
    RESULT_FILE,
    RunDirectory,
)
from fedllm.strategy import (
    ClientLevelDP,
    Round,
    cosine,
    make_strategy,
    num_sampled,
)

logger = logging.getLogger(__name__)

_DESTRUCTIVE = 0.1
_PACKAGES = ("flwr", "torch", "transformers", "peft", "trl", "bitsandbytes")


@dataclass
class _Best:
    """The round with the lowest validation loss; round 0 is the untuned model."""

    server_round: int
    loss: float
    arrays: Arrays


class Federation:
    """One run of a federation.

    Args:
        config: The run config.
        grid: Flower's way to the clients.
        run_id: Flower's id of the run.
    """

    def __init__(self, config: RunConfig, grid: Grid, run_id: int) -> None:
        from fedllm.models import load_config, locate

        self.config = config
        self.grid = grid
        home = fedllm_home()
        self.directory = RunDirectory.create(home, run_id)
        logger.info("run folder: %s", self.directory.path)
        self.base_name = locate(config.model.name, home)
        model_config = load_config(self.base_name)
        self.spec: AdapterSpec = adapter_spec(config.adapter, model_config, config.seed)
        self.public = PublicRows(config, self.base_name, self.spec, home)
        self.population = wait_for_clients(grid, config)
        self.ledger = self._open_ledger() if config.privacy.unit != "none" else None
        self.strategy = make_strategy(
            config, initial_arrays(self.spec), self.population, self.ledger
        )
        self.arrays: Arrays = initial_arrays(self.spec)
        self.best: _Best | None = None
        self.last_round = 0
        self.trained = False
        self._failures: Counter[str] = Counter()
        self.directory.write_json(CONFIG_FILE, self._resolved())
        if self.ledger is None:
            nothing = no_privacy(len(self.population), self.spec.num_trainable)
            self.directory.write_json(PRIVACY_FILE, nothing)

    def run(self) -> dict[str, Any]:
        """Train, save and report.

        Returns:
            The content of result.json.

        Raises:
            FederationError: No client ever returned a usable update.
            PrivacyError: Noise alone does harm and the run was told to refuse.
        """
        self._evaluate_base()
        if isinstance(self.strategy, ClientLevelDP):
            self._say_promise(self.strategy)
        for server_round in range(1, self.config.num_server_rounds + 1):
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
        self._require_training()
        return self._finish()

    def _open_ledger(self) -> Ledger:
        """Fix the noise before round 1 and start the ledger."""
        config = self.config
        privacy, strategy = config.privacy, config.strategy
        size, rounds = len(self.population), config.num_server_rounds
        delta = privacy.delta or default_delta(size)
        sampled: float = num_sampled(strategy, size)
        if strategy.sampling == "poisson":
            sampled = strategy.fraction_train * size
        noise = privacy.noise_multiplier or calibrate(
            privacy.target_epsilon,
            rounds,
            delta,
            strategy.sampling,
            strategy.fraction_train,
        )
        settings = PrivacySettings(
            unit="client",
            sampling=strategy.sampling,
            population_size=size,
            num_sampled_clients=sampled,
            clipping_norm=privacy.clipping_norm,
            noise_multiplier=noise,
            delta=delta,
            target_epsilon=privacy.target_epsilon,
            max_epsilon=privacy.max_epsilon,
            num_trainable=self.spec.num_trainable,
            planned_rounds=rounds,
        )
        return Ledger.create(self.directory.path / PRIVACY_FILE, settings)

    def _say_promise(self, strategy: ClientLevelDP) -> None:
        """Say before round 1 what is promised, and what the noise alone does."""
        ledger, config = strategy.ledger, self.config
        settings = ledger.settings
        planned = ledger.epsilon_after(config.num_server_rounds)
        ratio = noise_to_signal(
            settings.noise_multiplier,
            settings.num_trainable,
            settings.num_sampled_clients,
        )
        logger.info(
            "privacy: %d rounds will spend epsilon %s (replace-one %s) at delta %g; "
            "noise multiplier %.4g, clipping norm %g",
            config.num_server_rounds,
            _number(planned.zero_out),
            _number(planned.replace_one),
            settings.delta,
            settings.noise_multiplier,
            settings.clipping_norm,
        )
        logger.info(
            "noise to signal R = %.3g (%d trained values, %g clients a round)",
            ratio,
            settings.num_trainable,
            settings.num_sampled_clients,
        )
        if planned.zero_out is None or planned.zero_out > 50:
            logger.warning("this is no protection to speak of: epsilon above 50")
        if not config.privacy.noise_probe or self.best is None:
            return
        before = self.best.loss
        after = self.public.validation_loss(strategy.noise_alone())
        if after is None:
            return
        harm = after - before
        ledger.note_probe({"before": before, "noise_alone": after})
        verdict = "harmless" if harm <= _DESTRUCTIVE else "destructive"
        logger.info(
            "noise alone moves the validation loss from %.3f to %.3f: %s",
            before,
            after,
            verdict,
        )
        if harm > _DESTRUCTIVE:
            advice = "; ".join(self._advice())
            if config.privacy.on_destructive_noise == "refuse":
                raise PrivacyError(
                    f"noise alone raises the validation loss by {harm:.2f}, and "
                    f"privacy.on-destructive-noise is 'refuse'. What helps: {advice}"
                )
            logger.warning("noise alone does harm. What helps: %s", advice)

    def _run_round(self, server_round: int) -> None:
        """Send, gather, aggregate, evaluate, save, and say so in one line."""
        config = self.config
        started = time.monotonic()
        messages = list(
            self.strategy.configure_train(
                server_round, array_record(self.arrays), ConfigRecord(), self.grid
            )
        )
        waiting = _Gathering(self.grid, messages, config.strategy.round_timeout)
        waiting.describe(server_round, config.num_server_rounds, self._may_count())
        record, _ = self.strategy.aggregate_train(server_round, waiting)
        gathered = time.monotonic()
        seen = self.strategy.round
        self._note_failures(server_round, seen)
        if seen.usable > 0 or config.strategy.sampling == "poisson":
            self.trained = True
        if record is not None:
            self.arrays = read_global(record, self.spec.trained_shapes)
        client_loss = self._evaluate_clients(server_round)
        self.last_round = server_round
        loss = self._validate(server_round)
        evaluated = time.monotonic()
        self._save(server_round, loss)
        done = time.monotonic()
        seconds = {
            "train": waiting.seconds,
            "aggregate": gathered - started - waiting.seconds,
            "evaluate": evaluated - gathered,
            "save": done - evaluated,
        }
        self._write_line(server_round, seen, loss, client_loss, seconds)
        parts = [f"round {server_round}/{config.num_server_rounds}"]
        if self._may_count():
            parts.append(f"{seen.usable} of {seen.asked} clients")
        if seen.train_loss is not None:
            parts.append(f"train loss {seen.train_loss:.3f}")
        if client_loss is not None:
            parts.append(f"client loss {client_loss:.3f}")
        if loss is not None:
            parts.append(f"validation loss {loss:.3f}")
        if self.ledger is not None:
            parts.append(f"epsilon {_number(self.ledger.epsilons().zero_out)}")
        parts.append(f"{done - started:.0f} s")
        logger.info("%s", ", ".join(parts))

    def _evaluate_base(self) -> None:
        """Measure the untuned model, which is round 0."""
        started = time.monotonic()
        loss = self.public.validation_loss(self.arrays)
        if loss is not None:
            self.best = _Best(0, loss, self.arrays)
            logger.info("round 0, the untuned model: validation loss %.3f", loss)
        seconds = {"train": 0.0, "aggregate": 0.0, "save": 0.0}
        seconds["evaluate"] = time.monotonic() - started
        self._write_line(0, Round(), loss, None, seconds)

    def _validate(self, server_round: int) -> float | None:
        """Measure the adapter on public validation rows, where it is due."""
        last = server_round == self.config.num_server_rounds
        if server_round % self.config.strategy.evaluate_every and not last:
            return None
        return self.public.validation_loss(self.arrays)

    def _evaluate_clients(self, server_round: int) -> float | None:
        """Ask clients for the loss on their own rows; without DP only."""
        messages = list(
            self.strategy.configure_evaluate(
                server_round, array_record(self.arrays), ConfigRecord(), self.grid
            )
        )
        if not messages:
            return None
        timeout = self.config.strategy.round_timeout
        gathering = _Gathering(self.grid, messages, timeout)
        metrics = self.strategy.aggregate_evaluate(server_round, gathering)
        return None if metrics is None else float(metrics["client-loss"])  # type: ignore[arg-type]

    def _save(self, server_round: int, loss: float | None) -> None:
        """Save the round where it is due, is the last, or is the best so far."""
        previous = server_round - 1
        if (
            previous
            and previous % self.config.output.save_every
            and not (self.best is not None and self.best.server_round == previous)
        ):
            self.directory.drop_round(previous)
        self.directory.save_round(
            server_round, self.spec, self.arrays, self.base_name, self._origin()
        )
        if loss is not None and self.best is not None and loss < self.best.loss:
            self.best = _Best(server_round, loss, self.arrays)
            self.directory.copy_adapter(server_round, "peft_best")

    def _finish(self) -> dict[str, Any]:
        """Test, recommend, and say what the run was worth."""
        final = self.directory.copy_adapter(self.last_round, "peft_final")
        recommended, arrays = str(final), self.arrays
        if self.best is not None:
            best = str(self.directory.path / "peft_best")
            recommended = best if self.best.server_round > 0 else "base"
            arrays = self.best.arrays
        tested = self._test(arrays)
        result = {
            "recommended": recommended,
            "num_rounds": self.last_round,
            "best_round": self.best.server_round if self.best else None,
            **tested,
        }
        self.directory.write_json(RESULT_FILE, result)
        self._say_result(result)
        return result

    def _test(self, arrays: Arrays) -> dict[str, Any]:
        """Measure the base and the recommended adapter on public test rows."""
        before = self.public.test_loss(initial_arrays(self.spec))
        after = self.public.test_loss(arrays)
        return {
            "test_loss_before": before.loss if before else None,
            "test_loss_after": after.loss if after else None,
            "test_examples": before.num_examples if before else 0,
        }

    def _say_result(self, result: Mapping[str, Any]) -> None:
        """End with what a person needs: path, loss, epsilon, what to type next."""
        before, after = result["test_loss_before"], result["test_loss_after"]
        if before is not None:
            logger.info(
                "test loss: %.3f before, %.3f after (%d public test questions)",
                before,
                after,
                result["test_examples"],
            )
        if result["recommended"] == "base":
            logger.warning(
                "the model does not beat the base on public rows: keep the base. "
                "What helps: %s",
                "; ".join(self._advice()),
            )
        elif before is not None:
            logger.info("the tuned model beats the base")
        if self.ledger is not None:
            spent = self.ledger.epsilons()
            logger.info(
                "epsilon: %s zero-out, %s replace-one, at delta %g",
                _number(spent.zero_out),
                _number(spent.replace_one),
                self.ledger.settings.delta,
            )
            logger.info("privacy: %s", self.ledger.as_dict()["statement"])
            heavy = len(self.population) < 10
            if heavy and result["recommended"] != "base":
                logger.info(
                    "with %d clients the noise on each is heavy; more clients would "
                    "help most",
                    len(self.population),
                )
        else:
            logger.info("privacy: none: no noise was added, and epsilon is not bounded")
        logger.info("run folder: %s", self.directory.path)
        logger.info(
            'ask it: python evaluate.py --question "What are some symptoms of '
            'covid-19?" --base'
        )

    def _advice(self) -> list[str]:
        """Say what would help against the noise."""
        from fedllm.privacy.planning import advice

        if self.ledger is None:
            return ["more rounds", "a lower train.learning-rate"]
        settings = self.ledger.settings
        return advice(
            settings.noise_multiplier,
            settings.num_trainable,
            settings.num_sampled_clients,
            settings.planned_rounds,
        )

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
                (
                    f": {text}"
                    if text
                    else "; the reason is in that client's own log, "
                    "logs/client-<partition>.log under its ~/.fedllm"
                ),
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
            "(logs/client-<partition>.log under its ~/.fedllm) has the whole story"
        )

    def _write_line(
        self,
        server_round: int,
        seen: Round,
        loss: float | None,
        client_loss: float | None,
        seconds: Mapping[str, float],
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
        self.directory.add_metrics(
            {
                "server_round": server_round,
                "clients_asked": seen.asked if known else None,
                "clients_answered": seen.answered if known else None,
                "clients_rejected": len(seen.rejected) if known else None,
                "train_loss": seen.train_loss,
                "validation_loss": loss,
                "client_loss": client_loss,
                "seconds": {k: round(v, 3) for k, v in seconds.items()},
                "megabytes_down": seen.bytes_down / 1e6 if known else None,
                "megabytes_up": seen.bytes_up / 1e6 if known else None,
                "epsilon": epsilon,
                "learning_rate": rate if server_round else None,
            }
        )

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
                **{name: version(name) for name in _PACKAGES},
            },
        }


class _Gathering:
    """Replies of one round, yielded as they arrive.

    Iterating asks for one message id a call, since Grid inflates all that it is asked
    for; so at most one reply is in memory. Each message is answered at most once.
    """

    def __init__(self, grid: Grid, messages: list[Message], timeout: float) -> None:
        self._grid = grid
        self._timeout = timeout
        self._started = time.monotonic()
        self._pending = [i for i in grid.push_messages(messages) if i is not None]
        self._asked = len(messages)
        self._title: str | None = None
        self.seconds = 0.0
        """Seconds spent waiting for clients, as opposed to aggregating."""

    def describe(self, server_round: int, num_rounds: int, may_count: bool) -> None:
        """Report progress under this title; not at all where counts are secret."""
        if may_count:
            self._title = f"round {server_round}/{num_rounds}"

    def __iter__(self) -> Iterator[Message]:
        """Yield replies until all are there or the time is up."""
        pause, answered, told = 0.05, 0, self._started
        while self._pending:
            arrived = False
            for message_id in list(self._pending):
                began = time.monotonic()
                replies = self._pull(message_id)
                self.seconds += time.monotonic() - began
                if replies is None:
                    continue
                self._pending.remove(message_id)
                arrived = True
                answered += 1
                if replies:
                    yield replies[0]
                now = time.monotonic()
                if self._title and (now - told > 5 or answered == self._asked):
                    logger.info(
                        "%s: %d of %d clients answered after %.0f s",
                        self._title,
                        answered,
                        self._asked,
                        now - self._started,
                    )
                    told = now
            left = self._started + self._timeout - time.monotonic()
            if left <= 0 or not self._pending:
                return
            pause = 0.05 if arrived else min(1.0, pause * 1.5)
            time.sleep(min(pause, left))
            self.seconds += min(pause, left)

    def _pull(self, message_id: str) -> list[Message] | None:
        """Return the reply to one message; None while there is none.

        A reply that cannot even be inflated is dropped, and counts as zero.
        """
        try:
            replies = list(self._grid.pull_messages([message_id]))
        except (ConnectionError, TimeoutError):
            return None
        except Exception as error:  # noqa: BLE001 - hostile bytes must not stop a round
            logger.warning("a reply could not be read: %s", type(error).__name__)
            return []
        return replies[:1] or None


def wait_for_clients(grid: Grid, config: RunConfig) -> list[int]:
    """Wait until enough clients are connected and return their node ids.

    Raises:
        FederationError: They are too few when the time is up.
    """
    wanted = config.strategy.num_clients
    deadline = time.monotonic() + config.strategy.wait_for_clients
    told = False
    while True:
        nodes = sorted(grid.get_node_ids())
        if len(nodes) >= max(wanted, 2):
            # More than were asked for: the first by id, which Flower draws at random.
            return nodes[:wanted] if wanted else nodes
        if time.monotonic() > deadline:
            raise FederationError(
                f"strategy.num-clients: {max(wanted, 2)} clients are asked for, but "
                f"{len(nodes)} are connected after {config.strategy.wait_for_clients:g} "
                "s; start more SuperNodes (in simulation add --federation-config "
                f'"num-supernodes={max(wanted, 2)}"), or lower strategy.num-clients '
                "(0 takes those that are there)"
            )
        if not told:
            count = max(wanted, 2)
            logger.info("waiting for clients: %d of %d connected", len(nodes), count)
            told = True
        time.sleep(0.5)


def _number(value: float | None) -> str:
    """Write an epsilon plainly."""
    if value is None or value != value or value == float("inf"):
        return "not bounded"
    return (
        f"{value:,.0f}"
        if value >= 1000
        else f"{value:.3g}" if value < 1 else f"{value:.2f}"
    )
