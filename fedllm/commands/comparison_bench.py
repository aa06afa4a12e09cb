"""Trains the arms of a comparison in this process: federations by the real round loop.

All arms share one resident base model and one set of public rows.
"""

import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from safetensors.numpy import load, save

from fedllm.adapters.adapted_model import AdaptedModel
from fedllm.adapters.peft_model import initial_arrays
from fedllm.adapters.spec import Arrays
from fedllm.atomic_files import write_atomic
from fedllm.client.cache import client_rows, personal_rows, resident_model
from fedllm.client.log import ClientLog
from fedllm.client.message_handler import reply_to
from fedllm.client.node_config import parse_node_config
from fedllm.commands.comparison_arms import (
    FEDERATIONS,
    Arm,
    kind_of,
    lone_client,
    make_arm,
    start_of,
)
from fedllm.config import ResumeConfig, RunConfig, fedllm_home, flat
from fedllm.data.prompts import chat_prompt
from fedllm.errors import ConfigError
from fedllm.evaluation.held_out_loss import HeldOut, held_out
from fedllm.evaluation.multiple_choice import load_questions, multiple_choice
from fedllm.evaluation.public_rows import PublicRows
from fedllm.planning.adapter_choice import choose_adapter, with_choice
from fedllm.privacy.ledger import Ledger
from fedllm.runs.directory import METRICS_FILE, RunDirectory, read_metrics
from fedllm.server.federation import Federation
from fedllm.server.local_grid import LocalGrid
from fedllm.server.public_training import train_on_public_rows
from fedllm.server.startup import set_up
from fedllm.training.own_best import (
    OwnBest,
    OwnBestConfig,
    OwnRows,
    split_tenth,
    train_to_own_best,
)
from fedllm.training.personal import PersonalRows, train_personal

_T = TypeVar("_T")

_RUN_ID = 1
"""Of every arm but those of record level and sealed ones, whose nodes keep ledgers by it."""


class Bench:
    """One seed's resident base model and public rows, and the arms trained on them.

    Args:
        config: The run config, with the seed.
        num_clients: N.
        benchmark: File of multiple choice questions, or None.
        own_best: How every arm that is no federation is trained.

    Raises:
        ConfigError: There are no public test rows.
        DataError: The benchmark cannot be read.
    """

    def __init__(
        self,
        config: RunConfig,
        num_clients: int,
        benchmark: str | None,
        own_best: OwnBestConfig,
    ) -> None:
        config = replace(config, resume=ResumeConfig())
        if config.adapter.kind == "auto":
            config = with_choice(config, choose_adapter(config, num_clients))
        self.config = config
        self.num_clients = num_clients
        self._own_best = own_best
        self._questions = load_questions(Path(benchmark)) if benchmark else None
        self._adapted = resident_model(config).adapted
        self._base = self._beginning = initial_arrays(self._adapted.spec)
        if config.data.public_train:
            # Federations do it for themselves: nobody else has fewer public rows.
            self._beginning = train_on_public_rows(self._adapted, config, self._base)
        self._public = SharedRows(config, fedllm_home(), self._adapted)
        self._test_score(self._base)

    def measure(self, arm: str, folder: Path) -> dict[str, Any]:
        """Train an arm, let rows that no test has choose its adapter, and score that once.

        Args:
            arm: One of `arm_names`.
            folder: Gets the adapter of a federation, and its run folder in a folder of the
                arm's name.

        Raises:
            ConfigError: The arm trains on from another that was not trained.
            DataError: A client has too few rows.
            FederationError: No client returned a usable update.
        """
        if arm == "base":
            return self._scores(self._base)
        if arm not in FEDERATIONS:
            return self._measure_lone(arm, folder)
        run = new_run(folder / arm)
        made = make_arm(arm, self.config, self.num_clients)
        federation = self._train(made, run)
        progress = federation.progress
        chosen = progress.arrays if progress.best is None else progress.best.arrays
        write_atomic(_adapter(folder, arm), save(dict(chosen)))
        row = {**self._scores(chosen), **_figures(federation)}
        return row | {"examples": self._examples(made.config, row["best_round"])}

    def _measure_lone(self, arm: str, folder: Path) -> dict[str, Any]:
        """Train one client, or all rows as one, to its own best, and score that."""
        began = time.monotonic()
        start = self._start(start_of(arm), folder)
        if self.config.is_personal and kind_of(arm) == "personal":
            return self._measure_personal(arm, start, began)
        found = train_to_own_best(
            self._adapted,
            self._own_rows(arm),
            start,
            self.config.train,
            self._own_best,
            self._loss,
        )
        return {**self._scores(found.arrays), **_lone_figures(found, began)}

    def _measure_personal(
        self, arm: str, shared: Arrays, began: float
    ) -> dict[str, Any]:
        """Do what a node does after a run with personal training, and score its choice."""
        config = self.config
        made = train_personal(
            self._adapted, self._personal_rows(arm), shared, config, self._loss
        )
        figures = _lone_figures(made.search, began)
        return {**self._scores(made.arrays), **figures, "choice": made.choice}

    def _own_rows(self, arm: str) -> OwnRows:
        """Return an arm's rows: held out are those that no round has trained on, if any.

        Raises:
            DataError: There are too few.
        """
        if not self.config.is_personal:
            return split_tenth(self._rows(arm), self._own_best.seed)
        rows = self._personal_rows(arm)
        return OwnRows(rows.training, rows.stopping)

    def _personal_rows(self, arm: str) -> PersonalRows:
        """Return the rows that a node has for its personal training.

        Raises:
            DataError: There are too few.
        """
        config, values = lone_client(arm, self.config, self.num_clients)
        node, log = parse_node_config(values), ClientLog(0, _RUN_ID)
        return personal_rows(resident_model(config), node, config, log)

    def _loss(self, rows: Sequence[Mapping[str, Any]]) -> float:
        """Return the resident model's loss on rows."""
        model, pad = self._adapted.model, self._adapted.pad_token_id
        return held_out(model, rows, pad, self.config.train).loss

    def _start(self, arm: str, folder: Path) -> Arrays:
        """Return the adapter of an arm that was trained, or what all begin with.

        Raises:
            ConfigError: The arm was not trained.
        """
        if arm == "base":
            return self._beginning
        path = _adapter(folder, arm)
        if not path.exists():
            raise ConfigError(
                f"--arms: personal trains on from {arm}, which was not trained: name it too"
            )
        arrays: Arrays = load(path.read_bytes())
        return arrays

    def _examples(self, config: RunConfig, rounds: int) -> float:
        """Return how many examples a client trains on in so many rounds, in the mean."""
        train, count = config.train, self.num_clients
        each = float(train.local_steps * train.batch_size * train.gradient_accumulation)
        if config.is_joint:
            # The expected batch is that of all clients together.
            each /= count
        elif train.local_steps == 0:
            each = train.local_epochs * len(self._rows("centralised")) / count
        return rounds * each * config.strategy.expected_cohort(count) / count

    def _rows(self, arm: str) -> Sequence[Mapping[str, Any]]:
        """Return the rows of an arm that is no federation.

        Raises:
            DataError: The client has none.
        """
        config, values = lone_client(arm, self.config, self.num_clients)
        node, log = parse_node_config(values), ClientLog(0, _RUN_ID)
        return client_rows(resident_model(config), node, config, log)

    def _train(self, arm: Arm, directory: RunDirectory) -> Federation:
        """Run an arm's federation to its end."""
        config = arm.config
        keeps_ledgers = config.privacy.unit == "record" or config.is_sealed
        run_id = secrets.randbits(63) if keeps_ledgers else _RUN_ID
        grid = LocalGrid(reply_to, arm.nodes, flat(arm.config), run_id)
        federation = set_up(
            arm.server_config, grid, run_id, least_clients=1, directory=directory
        )
        federation.public = self._public
        federation.run()
        return federation

    def _scores(self, arrays: Arrays) -> dict[str, Any]:
        """Return an adapter's scores, with the figures of an arm that was not trained."""
        score = self._test_score(arrays)
        row: dict[str, Any] = {
            "validation_losses": [],
            "best_round": 0,
            "test_loss": score.loss,
            "perplexity": score.perplexity if score.preferred is None else None,
            "pairs_preferred": score.preferred,
            "pairs_likelier": score.likelier,
            "test_examples": score.num_examples,
            "seconds": 0.0,
            "megabytes": None,
            "failed_replies": 0,
            "epsilon": None,
            "accuracy": None,
            "examples": 0.0,
        }
        if self._questions is not None:
            self._adapted.set(arrays)
            tokenizer = self._adapted.tokenizer
            choice = multiple_choice(
                self._adapted.model,
                tokenizer,
                self._questions,
                lambda question: chat_prompt(tokenizer, question),
            )
            row |= {"accuracy": choice.accuracy, "chance": choice.chance}
        return row

    def _test_score(self, arrays: Arrays) -> HeldOut:
        """Return the score on public test rows.

        Raises:
            ConfigError: There are none.
        """
        score = self._public.test_loss(arrays)
        if score is None:
            raise ConfigError(
                "data.public-test: compare needs public test rows: name a file"
            )
        return score


class SharedRows(PublicRows):
    """The public rows of all arms: what was just scored is not scored again.

    Every arm scores the base, as any run does, and the chosen adapter twice. Sample
    answers, which take longer than either, are in no table.
    """

    def __init__(self, config: RunConfig, home: Path, adapted: AdaptedModel) -> None:
        super().__init__(config, home, adapted)
        self._known: dict[str, list[tuple[Mapping[str, Any], Any]]] = {}

    def validation_loss(self, arrays: Mapping[str, Any]) -> float | None:
        """Return the loss on validation rows; None without such rows."""
        return self._remember("validation", arrays, super().validation_loss)

    def test_loss(self, arrays: Mapping[str, Any]) -> HeldOut | None:
        """Return the score on test rows; None without such rows."""
        return self._remember("test", arrays, super().test_loss)

    def questions(self, count: int) -> list[tuple[str, str]]:
        """Return no question, so that a run writes no sample answers."""
        return []

    def _remember(
        self,
        split: str,
        arrays: Mapping[str, Any],
        score_of: Callable[[Mapping[str, Any]], _T],
    ) -> _T:
        """Return a known score, or score the adapter."""
        known = self._known.setdefault(split, [])
        for other, score in known:
            if all(np.array_equal(other[name], arrays[name]) for name in arrays):
                return score  # type: ignore[no-any-return] # kept under its split
        score = score_of(arrays)
        # The first is the base, which every arm scores; of the others the latest.
        known[1:] = [(arrays, score)] if known else []
        if not known:
            known.append((arrays, score))
        return score


def new_run(parent: Path) -> RunDirectory:
    """Return a fresh run folder: that of an arm which was stopped is kept.

    Its ledger says what was released of the clients' rows.
    """
    number = 1
    while (path := parent / f"run-{number}").exists():
        number += 1
    path.mkdir(mode=0o700, parents=True)
    return RunDirectory(path)


def _adapter(folder: Path, arm: str) -> Path:
    return folder / f"{arm}.safetensors"


def _lone_figures(found: OwnBest, began: float) -> dict[str, Any]:
    """Return the figures of an arm that is no federation."""
    return {
        "validation_losses": found.losses,
        "best_round": None,
        "learning_rate": found.learning_rate,
        "examples": float(found.num_examples),
        "seconds": time.monotonic() - began,
    }


def _figures(federation: Federation) -> dict[str, Any]:
    """Return a training's losses, cost and epsilon, read from its run folder."""
    lines = read_metrics(federation.directory.path / METRICS_FILE)
    rounds = lines[1:]
    losses = [line["validation_loss"] for line in lines]
    best, account = federation.progress.best, federation.account
    figures: dict[str, Any] = {
        "validation_losses": [loss for loss in losses if loss is not None],
        "best_round": len(rounds) if best is None else best.server_round,
    }
    if federation.config.cohorts_are_secret:
        # How long a cohort takes, and how many fail, depends on how many it has.
        figures |= {"seconds": None, "failed_replies": None}
    else:
        figures["seconds"] = sum(sum(line["seconds"].values()) for line in rounds)
        figures["failed_replies"] = sum(line["clients_rejected"] for line in rounds)
        if len(federation.population) > 1:
            figures["megabytes"] = sum(
                line["megabytes_down"] + line["megabytes_up"] for line in rounds
            )
    figures["epsilon"] = account.epsilon(len(rounds))
    if isinstance(account.ledger, Ledger):
        figures["epsilon_replace_one"] = account.ledger.epsilons().replace_one
    return figures
