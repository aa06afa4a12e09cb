"""A sealed federation in one process: real clients, trustees and server, and no model."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from flwr.app import ConfigRecord, Message

from fedllm.client import message_handler
from fedllm.config_parsing import parse_run_config
from fedllm.node.delivered_app import CHOICE, INSTALLED
from fedllm.planning.joint_noise import joint_settings
from fedllm.planning.noise import privacy_settings
from fedllm.privacy.joint_ledger import JointLedger
from fedllm.privacy.ledger import Ledger
from fedllm.privacy.mechanism import FixedPointSum, clipped
from fedllm.server.reply_stream import ReplyStream
from fedllm.server.trustees import SealedNodes
from fedllm.strategy.build import make_strategy
from fedllm.training.task import RoundTask
from fedllm.wire.messages import ARRAYS, array_record, read_global
from tests.helpers.flower_messages import RUN_ID
from tests.helpers.identities import silence, write_identity
from tests.helpers.in_process_grid import InProcessGrid
from tests.helpers.strategies import SHAPES, START

C, Z = 0.5, 2.0
SIZE = sum(array.size for array in START.values())
SEALED = {
    "num-server-rounds": 3,
    "privacy.trust": "trustees",
    "privacy.trustees": "a,b,c",
    "privacy.colluding-trustees": 1,
    "privacy.post-quantum": False,
    "privacy.clipping-norm": C,
    "privacy.target-epsilon": 0.0,
    "privacy.noise-multiplier": Z,
    "privacy.delta": 1e-5,
    "strategy.server-learning-rate": 1.0,
    "strategy.server-learning-rate-min": 1.0,
    "strategy.wait-for-clients": 0.5,
    "strategy.round-timeout": 0.5,
}

G, B = 0.5, 4
RECORDS = {
    "privacy.unit": "record",
    "privacy.noise": "joint",
    "privacy.clipping-norm": 1.5,
    "privacy.max-grad-norm": G,
    "train.batch-size": B,
    "train.local-steps": 1,
}

Answer = Callable[[Message, Any], Message | None]


class SealedFederation:
    """Four clients, of which the first three are trustees.

    `updates` holds what each client's training adds, by partition, or the error that it
    raises; `answer` may be replaced to stand between server and nodes.
    """

    def __init__(self, folder: Path, clients: int = 4, **changes: Any) -> None:
        keys = {key.replace("__", "."): value for key, value in changes.items()}
        node = keys.pop("node", {})
        self.run_config = {**SEALED, **keys}
        self.config = parse_run_config(self.run_config)
        self.folder = folder
        named = {name: write_identity(folder, name) for name in self.config.trustees}
        self.pins = {name: pin for name, (_, pin) in named.items()}
        pins = ",".join(f"{name}:{pin}" for name, pin in self.pins.items())
        self.nodes: list[dict[str, Any]] = [
            {"data-path": "/rows", "partition-id": i, "trusted-trustees": pins, **node}
            for i in range(clients)
        ]
        for config, (name, (path, _)) in zip(self.nodes, named.items(), strict=False):
            config |= {"trustee-name": name, "trustee-key": str(path)}
        self.grid = InProcessGrid(self.nodes, self.run_config, self._answered)
        self.population = list(self.grid.get_node_ids())
        self.answer: Answer = message_handler.reply_to
        self.updates: dict[int, Any] = {}
        self.trained: list[int] = []
        self.replies: list[Message] = []
        self.messages: list[Message] = []

    def _answered(self, message: Message, context: Any) -> Message | None:
        return self.answer(message, context)

    def train(self, message: Message, client: Any, fitted: Any) -> Any:
        """What stands in the place of a training."""
        arrays = read_global(message.content.array_records[ARRAYS], SHAPES)
        self.trained.append(client.node.partition_id)
        update = self.updates.get(client.node.partition_id, 0.01)
        if isinstance(update, Exception):
            raise update
        flat, start, trained = np.full(SIZE, update, np.float64), 0, {}
        for name in sorted(arrays):
            part = flat[start : start + arrays[name].size]
            trained[name] = (arrays[name] + part.reshape(arrays[name].shape)).astype(
                np.float32
            )
            start += arrays[name].size
        return trained, arrays

    def begin(self) -> Any:
        """Meet the nodes and open the ledger."""
        self.sealed = SealedNodes(self.grid, self.config, RUN_ID, ConfigRecord())
        meeting = self.sealed.meet()
        self.population, roster = meeting.population, meeting.roster
        path, kind = self.folder / "privacy.json", self.ledger_type
        settings = self.privacy(list(meeting.declared.values()), len(roster.present))
        ledger = kind.load(path) if path.exists() else kind.create(path, settings)
        self.strategy = make_strategy(
            self.config, START, self.population, ledger, roster
        )
        return self.strategy

    ledger_type: Any = Ledger

    def privacy(self, declared: list[int], trustees: int) -> Any:
        """What the run promises."""
        return privacy_settings(
            self.config, len(self.population), SIZE, trustees=trustees
        )

    def round(self, server_round: int = 1) -> Any:
        """One round; returns how far the adapter moved, (d,), None if it is lost."""
        before = dict(self.strategy.averaging.reference)
        self.messages = list(
            self.strategy.configure_train(
                server_round, array_record(before), ConfigRecord(), self.grid
            )
        )
        stream = ReplyStream(
            self.grid, self.messages, self.config.strategy.round_timeout
        )
        self.replies = []

        def noted() -> Any:
            for reply in stream:
                self.replies.append(reply)
                yield reply

        record, _ = self.strategy.aggregate_train(server_round, noted())
        if record is None:
            return None
        after = read_global(record, SHAPES)
        moved = [(after[k] - before[k]).ravel() for k in sorted(before)]
        return np.concatenate(moved).astype(float)

    def context(self, partition: int) -> Any:
        """The context of one node."""
        return self.grid.contexts[self.population[partition]]


class SealedRecords(SealedFederation):
    """The same at record level: four clients of 8 declared rows each, B = 4.

    `updates` holds a client's batch: a list of gradients, or an error. Which coins fell is
    not asked: the batch is what they chose.
    """

    ledger_type = JointLedger

    def __init__(self, folder: Path, clients: int = 4, **changes: Any) -> None:
        node = {"declared-rows": 8, **changes.pop("node", {})}
        super().__init__(folder, clients, node=node, **{**RECORDS, **changes})
        self.units: list[int] = []
        self.plans: list[Any] = []

    def privacy(self, declared: list[int], trustees: int) -> Any:
        return joint_settings(self.config, declared, SIZE, trustees)

    def take_up(self, message: Message, client: Any, fitted: Any) -> Any:
        """What stands in the place of a model and rows."""
        self.trained.append(client.node.partition_id)
        batch = self.updates.get(client.node.partition_id, [])
        if isinstance(batch, Exception):
            raise batch
        spec = SimpleNamespace(num_trainable=SIZE)
        return SimpleNamespace(spec=spec), batch, RoundTask({}, 1.0)

    def batch_sum(
        self, adapted: Any, batch: Any, config: Any, plan: Any, task: Any, units: int
    ) -> Any:
        """What stands in the place of the gradients of a batch."""
        self.units.append(units)
        self.plans.append(plan)
        total = FixedPointSum(SIZE, G, units)
        for gradient in batch:
            update = clipped(np.full(SIZE, gradient, np.float64), G).update
            if update is not None:
                total.add(update)
        named, start = {}, 0
        for name in sorted(SHAPES):
            size = START[name].size
            named[name] = total.integers()[start : start + size].reshape(SHAPES[name])
            start += size
        # In another order than they travel.
        turned = dict(reversed(named.items()))
        return SimpleNamespace(integers=turned, num_unfit=0)


@pytest.fixture
def records(sealed: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Make a sealed federation at record level in a home of its own."""

    def make(**changes: Any) -> SealedRecords:
        federation = SealedRecords(tmp_path, **changes)
        monkeypatch.setattr(message_handler, "_records", federation.take_up)
        # By its name: a module that loads torch is imported by the tests that need it.
        monkeypatch.setattr(
            "fedllm.training.joint_step.batch_sum", federation.batch_sum
        )
        return federation

    return make


@pytest.fixture
def sealed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Make a sealed federation in a home of its own."""
    monkeypatch.setenv("FEDLLM_HOME", str(tmp_path / "home"))
    monkeypatch.setenv(CHOICE, INSTALLED)
    monkeypatch.setattr(
        message_handler, "_fitted_config", lambda _, client: client.config
    )

    def make(**changes: Any) -> SealedFederation:
        federation = SealedFederation(tmp_path, **changes)
        monkeypatch.setattr(message_handler, "_update_alone", federation.train)
        return federation

    return make


@pytest.fixture
def silent(monkeypatch: pytest.MonkeyPatch) -> None:
    """No noise, so that sums can be compared exactly."""
    silence(monkeypatch)
    monkeypatch.setattr("fedllm.strategy.sealed_dp.is_plausible", lambda *_: True)
