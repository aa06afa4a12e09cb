"""Canary examples among one client's records: a membership test of its DP-SGD.

The client trains as in a run, by the code of a run, on its own records and on canaries:
examples of random tokens, each planted or not by a fair coin. An attacker who sees only the
adapter guesses from the fall of their losses which were planted. The number of right guesses
bounds epsilon from below (Steinke, Nasr and Jagielski 2023, arXiv 2305.08846).
"""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from flwr.app import Message, RecordDict

from fedllm.adapters.adapted_model import AdaptedModel, load_adapted_model
from fedllm.adapters.peft_model import initial_arrays
from fedllm.config import RunConfig
from fedllm.evaluation.held_out_loss import held_out
from fedllm.models.limits import num_embeddings
from fedllm.planning.joint_noise import joint_settings
from fedllm.planning.record_noise import client_plan
from fedllm.privacy.accounting import record_epsilon
from fedllm.privacy.joint_ledger import JointLedger, JointSettings
from fedllm.privacy.lower_bounds import (
    CertifiedBound,
    certified_bound,
    membership_bound,
)
from fedllm.privacy.mechanism import SecureGenerator
from fedllm.privacy.record_ledger import RecordPlan
from fedllm.strategy.build import make_strategy
from fedllm.training.person_gradients import Record
from fedllm.training.task import RoundTask
from fedllm.wire.masking import masked
from fedllm.wire.messages import ARRAYS, array_record, read_global
from fedllm.wire.task_identity import set_task_identity

if TYPE_CHECKING:
    from datasets import Dataset

_PROMPT_TOKENS = 8
_ANSWER_TOKENS = 16

ROWS_OF_A_PERSON = 3
"""Rows of a canary where a record is a person."""

Train = Callable[[Sequence[Record], Mapping[str, Any]], Mapping[str, Any]]
"""One round of one client: examples and the adapter's trained values -> new values."""


@dataclass(frozen=True)
class RecordFindings:
    """The result of a membership test.

    Attributes:
        accounted: Epsilon by accounting, add-or-remove of one record.
        certified: Lower bound on epsilon from the guesses.
        most: The bound if every guess were right: the largest for as many canaries.
        num_canaries: Canaries, planted or not.
        num_records: Records of the client, without canaries.
        num_rounds: Rounds that the client trained in.
        fall_planted: Mean fall of the loss of planted canaries, nats per token.
        fall_others: The same for the others.
    """

    accounted: float
    certified: CertifiedBound
    most: float
    num_canaries: int
    num_records: int
    num_rounds: int
    fall_planted: float
    fall_others: float

    @property
    def passed(self) -> bool:
        """Whether the bound does not contradict the accounting."""
        return self.certified.epsilon <= self.accounted

    def as_dict(self) -> dict[str, Any]:
        """Return the content of audit.json."""
        return {**asdict(self), "passed": self.passed}


def audit_first_client(
    config: RunConfig, num_clients: int, num_canaries: int
) -> RecordFindings:
    """Test the first of a run's virtual clients, on the run's base model and data.

    Args:
        config: The run config, with `privacy.unit="record"`.
        num_clients: Clients that share the rows.
        num_canaries: Canaries, at least 1.

    Raises:
        FedllmError: Model or data cannot be loaded, or the client has too few records.
    """
    from fedllm.config import fedllm_home
    from fedllm.data.partitions import partition
    from fedllm.data.rows import load_rows
    from fedllm.training.dp_sgd import train_privately

    adapted = load_adapted_model(config, fedllm_home())
    rows = partition(config.data, load_rows(config.data), 0, num_clients, config.seed)
    examples, is_by_person = _records(adapted, config, rows)
    expected = len(examples) + num_canaries // 2
    size = ROWS_OF_A_PERSON if is_by_person else 1
    if config.is_joint:
        others = _number(config, load_rows(config.data)) - _number(config, rows)
        joint = joint_settings(config, (expected, others), adapted.spec.num_trainable)
        with tempfile.TemporaryDirectory(prefix="fedllm-audit-") as folder:
            step = joint_step(adapted, config, joint, Path(folder))
            plan = joint_plan(joint)
            return audit_records(
                adapted, examples, config, plan, num_canaries, step, size
            )
    plan = client_plan(config, expected, config.privacy.target_epsilon)

    def train(records: Sequence[Record], arrays: Mapping[str, Any]) -> Any:
        task = RoundTask(arrays, config.train.learning_rate)
        return train_privately(adapted, records, config, plan, task).arrays

    return audit_records(adapted, examples, config, plan, num_canaries, train, size)


def _records(
    adapted: AdaptedModel, config: RunConfig, rows: "Dataset"
) -> tuple[list[Record], bool]:
    """Return the records of some rows, and whether each is a person."""
    from fedllm.data.persons import by_person
    from fedllm.data.tokens import tokenize

    length, column = config.train.max_length, config.data.person_column
    found = tokenize(rows, adapted.tokenizer, config.data, length)
    if not column:
        return [*found.examples], False
    persons = by_person(rows[column][:]).records(found.records)
    return [person for person in persons if person is not None], True


def _number(config: RunConfig, rows: "Dataset") -> int:
    """Return how many records some rows are, whatever they hold."""
    from fedllm.data.persons import by_person

    column = config.data.person_column
    return len(by_person(rows[column][:]).places) if column else len(rows)


def joint_plan(settings: JointSettings) -> RecordPlan:
    """Return the plan of each client's step under one noise for all."""
    return RecordPlan(
        noise_multiplier=settings.noise_multiplier,
        sampling_probability=settings.sampling_probability,
        steps=1,
        expected_batch_size=settings.expected_batch_size,
        delta=settings.delta,
    )


def joint_step(
    adapted: AdaptedModel, config: RunConfig, settings: JointSettings, folder: Path
) -> Train:
    """Return the round of a run with one noise: one client's sum, the server's real step.

    All other clients stay silent: the attacker of the definition knows their sums.

    Args:
        adapted: The model; its trained values are overwritten.
        config: The run config, with `privacy.noise="joint"`.
        settings: Those of the run; the first client is the one that trains.
        folder: For the run's ledger.
    """
    from fedllm.training.joint_step import batch_sum

    set_task_identity()
    population = list(range(1, settings.population_size + 1))
    ledger = JointLedger.create(folder / "privacy.json", settings)
    start = initial_arrays(adapted.spec)
    strategy = make_strategy(config, start, population, ledger)
    plan = joint_plan(settings)

    def step(records: Sequence[Record], arrays: Mapping[str, Any]) -> Any:
        server_round = len(ledger.releases) + 1
        task = RoundTask(arrays, config.train.learning_rate)
        summed = batch_sum(adapted, records, config, plan, task)
        content = RecordDict({ARRAYS: array_record(summed.integers)})
        reply = Message(masked(content), reply_to=Message(RecordDict(), 1, "train"))
        released, _ = strategy.aggregate_train(server_round, [reply])
        return read_global(released, adapted.spec.trained_shapes) if released else {}

    return step


def audit_records(
    adapted: AdaptedModel,
    examples: Sequence[Record],
    config: RunConfig,
    plan: RecordPlan,
    num_canaries: int,
    train: Train,
    rows_per_canary: int = 1,
) -> RecordFindings:
    """Train one client on its records and planted canaries, and guess which were planted.

    Args:
        adapted: The model; its trained values are overwritten.
        examples: The client's own tokenised, labelled records.
        config: Gives the number of rounds.
        plan: The client's noise and batches, fixed before the coins are thrown.
        num_canaries: Canaries, at least 1.
        train: One round.
        rows_per_canary: Above 1 a canary is a person with so many rows.
    """
    generator = SecureGenerator()
    vocabulary = num_embeddings(adapted.model.get_base_model())
    canaries: list[Record] = [
        _canary(generator, vocabulary, rows_per_canary) for _ in range(num_canaries)
    ]
    planted = generator.bernoulli(0.5, num_canaries)
    records = [
        *examples,
        *(c for c, coin in zip(canaries, planted, strict=True) if coin),
    ]
    arrays: Mapping[str, Any] = initial_arrays(adapted.spec)
    before = _losses(adapted, arrays, canaries)
    for _ in range(config.num_server_rounds):
        arrays = train(records, arrays)
    change = _losses(adapted, arrays, canaries) - before
    z, q, steps = plan.event
    events = [(z, q, steps * config.num_server_rounds)]
    return RecordFindings(
        accounted=record_epsilon(events, plan.delta),
        certified=membership_bound(change[planted], change[~planted], plan.delta),
        most=most_certifiable(num_canaries, plan.delta),
        num_canaries=num_canaries,
        num_records=len(examples),
        num_rounds=config.num_server_rounds,
        fall_planted=-float(change[planted].mean()) if planted.any() else 0.0,
        fall_others=-float(change[~planted].mean()) if not planted.all() else 0.0,
    )


def most_certifiable(num_canaries: int, delta: float) -> float:
    """Return the bound if every canary is guessed and every guess is right."""
    return certified_bound(num_canaries, num_canaries, num_canaries, delta).epsilon


def _canary(generator: SecureGenerator, vocabulary: int, num_rows: int) -> Record:
    """Make an example of random tokens, or the several of one person."""
    rows = tuple(_random_example(generator, vocabulary) for _ in range(num_rows))
    return rows[0] if num_rows == 1 else rows


def _random_example(
    generator: SecureGenerator, vocabulary: int
) -> dict[str, list[int]]:
    """Make an example of random tokens, which no other example helps to predict."""
    size = _PROMPT_TOKENS + _ANSWER_TOKENS
    tokens = [
        generator.sample_without_replacement(vocabulary, 1)[0] for _ in range(size)
    ]
    labels = [-100] * _PROMPT_TOKENS + tokens[_PROMPT_TOKENS:]
    return {"input_ids": tokens, "labels": labels}


def _losses(
    adapted: AdaptedModel,
    arrays: Mapping[str, Any],
    canaries: Sequence[Record],
) -> Any:
    """Return (canaries,) losses, nats per token."""
    adapted.set(arrays)
    rows = ([*c] if isinstance(c, tuple) else [c] for c in canaries)
    return np.array([held_out(adapted.model, canary, 0).loss for canary in rows])
