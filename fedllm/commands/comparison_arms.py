"""The arms of a comparison: their settings, and the real round loop that trains each.

All arms share one resident base model, in this process, and one set of public rows.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedllm.config import ResumeConfig, RunConfig, fedllm_home, flat, parse_run_config
from fedllm.errors import ConfigError

if TYPE_CHECKING:
    from fedllm.adapters.spec import Arrays
    from fedllm.evaluation.held_out_loss import HeldOut
    from fedllm.evaluation.public_rows import PublicRows
    from fedllm.server.federation import Federation

ARMS = ("base", "federated", "federated-dp", "centralised", "alone")
_RUN_ID = 1
"""A simulated client keeps nothing by it that outlives an arm."""


def arms(config: RunConfig, num_clients: int, alone: int | None = None) -> list[str]:
    """Return the names of the arms, the most expensive last.

    Args:
        config: The run config.
        num_clients: N.
        alone: How many clients are trained alone, evenly spaced; None: all.
    """
    names = ["base", "federated"]
    if config.privacy.unit == "client":
        names.append("federated-dp")
    number = num_clients if alone is None else min(alone, num_clients)
    chosen = [i * num_clients // number for i in range(number)]
    return [*names, "centralised", *(f"alone-{i}" for i in chosen)]


def without_privacy(config: RunConfig) -> RunConfig:
    """Return a config without privacy that differs from the given one in nothing else."""
    mapping = {k: v for k, v in flat(config).items() if not k.startswith("privacy.")}
    mapping |= {"privacy.unit": "none", "privacy.target-epsilon": 0.0}
    if mapping["strategy.sampling"] == "poisson":
        mapping["strategy.sampling"] = "fixed"
    return parse_run_config(mapping)


def centralised(config: RunConfig, num_clients: int) -> RunConfig:
    """Return a config of one client that sees as many examples as all together.

    With `train.local-epochs` one epoch over all rows is that already if all clients are
    sampled.
    """
    config = without_privacy(config)
    sampled = config.strategy.num_sampled(num_clients)
    train = config.train
    if train.local_steps:
        train = replace(train, local_steps=train.local_steps * sampled)
    else:
        epochs = train.local_epochs * sampled / num_clients
        train = replace(train, local_epochs=epochs)
    # One client has all rows under any partition, and `natural` refuses one client.
    data = replace(config.data, partition="iid")
    return _all_sampled(replace(config, data=data, train=train))


def _all_sampled(config: RunConfig) -> RunConfig:
    """Return a config whose only client takes part in every round."""
    strategy = replace(config.strategy, sampling="all", fraction_train=1.0)
    return replace(config, strategy=strategy)


@dataclass(frozen=True)
class Arm:
    """One trained arm.

    Attributes:
        config: The run config that its clients get.
        nodes: Each client's node config.
    """

    config: RunConfig
    nodes: Sequence[Mapping[str, int]]

    @property
    def server_config(self) -> RunConfig:
        """The run config of its server, without what no table needs.

        The losses do not change: not asked are clients' own losses, the probe of the
        noise, and rounds that validation did not choose.
        """
        config, strategy = self.config, self.config.strategy
        strategy = replace(
            strategy,
            num_clients=0,
            fraction_evaluate=0.0,
            # Clients answer one after another, and each may take a round's time.
            round_timeout=strategy.round_timeout * len(self.nodes),
        )
        privacy = replace(config.privacy, noise_probe=False)
        output = replace(
            config.output, save_every=config.num_server_rounds, tracker="none"
        )
        return replace(config, strategy=strategy, privacy=privacy, output=output)


def make_arm(name: str, config: RunConfig, num_clients: int) -> Arm:
    """Return the settings and clients of a trained arm.

    Args:
        name: One of `arms`, but not the base.
        config: The run config, with an adapter kind that is not `auto`.
        num_clients: N.
    """
    nodes = [_node(index, num_clients) for index in range(num_clients)]
    if name == "federated-dp":
        return Arm(config, nodes)
    if name == "federated":
        return Arm(without_privacy(config), nodes)
    if name == "centralised":
        return Arm(centralised(config, num_clients), [_node(0, 1)])
    index = int(name.removeprefix("alone-"))
    return Arm(_all_sampled(without_privacy(config)), [nodes[index]])


def _node(partition_id: int, num_partitions: int) -> dict[str, int]:
    return {"partition-id": partition_id, "num-partitions": num_partitions}


class Bench:
    """One seed's clients, public rows and resident base model.

    Args:
        config: The run config, with the seed.
        num_clients: N.
        benchmark: File of multiple choice questions, or None.

    Raises:
        ConfigError: There are no public test rows.
    """

    def __init__(
        self, config: RunConfig, num_clients: int, benchmark: str | None
    ) -> None:
        from fedllm.adapters.peft_model import initial_arrays
        from fedllm.client.cache import resident_model
        from fedllm.evaluation.multiple_choice import load_questions
        from fedllm.planning.adapter_choice import choose_adapter, with_choice

        config = replace(config, resume=ResumeConfig())
        if config.adapter.kind == "auto":
            config = with_choice(config, choose_adapter(config, num_clients))
        self.config = config
        self.num_clients = num_clients
        self._adapted = resident_model(config).adapted
        self._base = initial_arrays(self._adapted.spec)
        self._public = _shared_rows(config, self._adapted, self._base)
        self._questions = load_questions(Path(benchmark)) if benchmark else None
        if self._public.test_loss(self._base) is None:
            raise ConfigError(
                "data.public-test: compare needs public test rows: name a file"
            )

    def measure(self, arm: str, folder: Path) -> dict[str, Any]:
        """Train an arm, let validation choose its round, and score that once.

        Args:
            arm: One of `arms`.
            folder: Gets the arm's run folder.

        Raises:
            FederationError: No client returned a usable update.
        """
        if arm == "base":
            return self._row(self._base)
        federation = self._train(make_arm(arm, self.config, self.num_clients), folder)
        best = federation.progress.best
        chosen = federation.progress.arrays if best is None else best.arrays
        return {**self._row(chosen), **_figures(federation)}

    def _train(self, arm: Arm, folder: Path) -> "Federation":
        """Run an arm's federation to its end."""
        from fedllm.client.message_handler import reply_to
        from fedllm.runs.directory import RunDirectory
        from fedllm.server.local_grid import LocalGrid
        from fedllm.server.startup import set_up

        grid = LocalGrid(reply_to, arm.nodes, flat(arm.config), _RUN_ID)
        federation = set_up(
            arm.server_config,
            grid,
            _RUN_ID,
            least_clients=1,
            directory=RunDirectory(_new_folder(folder)),
        )
        federation.public = self._public
        federation.run()
        return federation

    def _row(self, arrays: "Arrays") -> dict[str, Any]:
        """Return the scores of the chosen adapter, and the figures of no training."""
        score = self._public.test_loss(arrays)
        assert score is not None  # there are test rows, or __init__ had raised
        row: dict[str, Any] = {
            "validation_losses": [],
            "best_round": 0,
            "test_loss": score.loss,
            "perplexity": score.perplexity,
            "test_examples": score.num_examples,
            "seconds": 0.0,
            "megabytes": None,
            "failed_replies": 0,
            "epsilon": None,
            "accuracy": None,
        }
        if self._questions is not None:
            row |= self._accuracy(arrays)
        return row

    def _accuracy(self, arrays: "Arrays") -> dict[str, float]:
        """Return the accuracy on multiple choice, and that of guessing."""
        from fedllm.data.prompts import chat_prompt
        from fedllm.evaluation.multiple_choice import multiple_choice

        assert self._questions is not None
        self._adapted.set(arrays)
        tokenizer = self._adapted.tokenizer
        choice = multiple_choice(
            self._adapted.model,
            tokenizer,
            self._questions,
            lambda question: chat_prompt(tokenizer, question),
        )
        return {"accuracy": choice.accuracy, "chance": choice.chance}


def _figures(federation: "Federation") -> dict[str, Any]:
    """Return what a training was: its losses, cost and privacy."""
    from fedllm.runs.directory import METRICS_FILE, read_metrics

    lines = read_metrics(federation.directory.path / METRICS_FILE)
    rounds = lines[1:]
    losses = [line["validation_loss"] for line in lines]
    best, config = federation.progress.best, federation.config
    secret = config.cohorts_are_secret
    figures: dict[str, Any] = {
        "validation_losses": [loss for loss in losses if loss is not None],
        "best_round": len(rounds) if best is None else best.server_round,
        # How many failed and how long a cohort takes depend on how many it has.
        "seconds": None if secret else _total(rounds, _seconds),
        "failed_replies": None if secret else _total(rounds, _rejected),
    }
    if not secret and len(federation.population) > 1:
        figures["megabytes"] = _total(rounds, _megabytes)
    if federation.account.ledger is not None:
        spent = federation.account.ledger.epsilons()
        figures["epsilon"] = spent.zero_out
        figures["epsilon_replace_one"] = spent.replace_one
    return figures
