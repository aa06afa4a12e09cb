"""FedAvg over adapters.

The composition is that of Flower's own wrappers: `ClientLevelDP(AdapterFedAvg(...))`.
Replies are read one at a time and added to a fixed-point sum, so that neither memory
nor the result depends on how many there are or in which order they come.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

import numpy as np
import numpy.typing as npt
from flwr.app import (
    ArrayRecord,
    ConfigRecord,
    Message,
    MessageType,
    MetricRecord,
    RecordDict,
)
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg

from fedllm.config import RunConfig
from fedllm.privacy.mechanism import (
    FixedPointSum,
    SecureGenerator,
    Vector,
    checked_update,
)
from fedllm.strategy.cohort import choose_cohort, seeded_cohort
from fedllm.strategy.robust import combine_robustly, validated_reply
from fedllm.strategy.round_stats import Round
from fedllm.strategy.server_optimizer import ServerOptimizer, cosine
from fedllm.wire.messages import (
    ARRAYS,
    CONFIG,
    DELIVER,
    Reply,
    array_record,
    encoded_record,
    own_config,
    read_global,
    read_reply,
)

# Without DP an update is bounded only by what the fixed-point sum can hold.
_LARGEST_VALUE = 1024.0

# A client that claims more examples counts for these; four million such clients fit.
_LARGEST_WEIGHT = 2**20


class AdapterFedAvg(FedAvg):
    """FedAvg that trusts no reply, streams the sum, and has a server optimiser.

    Args:
        config: The run config.
        reference: The global adapter's trained values by name.
        population: Node ids of all clients; fixed in number and order, while a client
            that comes back may have another id.
    """

    def __init__(
        self,
        config: RunConfig,
        reference: dict[str, npt.NDArray[np.float32]],
        population: list[int],
    ) -> None:
        super().__init__(min_train_nodes=0, min_evaluate_nodes=0)
        self.config = config
        self.population = list(population)
        self.reference = {k: np.array(v, np.float32) for k, v in reference.items()}
        self.shapes = {k: v.shape for k, v in self.reference.items()}
        self.optimizer = ServerOptimizer(
            config.strategy.server_optimizer, config.strategy.server_momentum
        )
        self.round = Round()
        self.fraction_evaluate = config.strategy.fraction_evaluate
        self.generator = SecureGenerator()
        self._server_round = 0
        self._busy: set[int] = set()
        self._earlier: dict[str, dict[str, npt.NDArray[np.float32]]] = {}

    @property
    def averaging(self) -> "AdapterFedAvg":
        """The strategy that averages: this one, with or without privacy around it."""
        return self

    @property
    def size(self) -> int:
        """Number d of trained values."""
        return sum(array.size for array in self.reference.values())

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Choose the cohort and make its messages, one at a time."""
        record = ConfigRecord(dict(config.items()))
        train = self.config.train
        record["server-round"] = server_round
        record["learning-rate"] = cosine(
            train.learning_rate,
            train.learning_rate_min,
            server_round,
            self.config.num_server_rounds,
        )
        sent = self._encoded(arrays, server_round)
        content = RecordDict({ARRAYS: sent, CONFIG: record})
        cohort = choose_cohort(
            self.config, self.population, server_round, self.generator
        )
        # Drawn from all: who is drawn depends on nobody's reply.
        cohort = [node for node in cohort if node not in self._busy]
        self._server_round = server_round
        if self.config.strategy.late_replies == "next-round":
            self._earlier[str(server_round)] = dict(self.reference)
        size = sum(len(array.data) for array in sent.values())
        self.round = Round(asked=len(cohort), bytes_down=size * len(cohort))
        return self._messages(content, cohort, MessageType.TRAIN, server_round)

    def expect_late(self, messages: Iterable[Message]) -> None:
        """Ask these messages' nodes for nothing more until their replies are there.

        Args:
            messages: Those of earlier rounds whose replies still count.
        """
        waiting = list(messages)
        self._busy = {message.metadata.dst_node_id for message in waiting}
        rounds = {message.metadata.group_id for message in waiting}
        self._earlier = {r: a for r, a in self._earlier.items() if r in rounds}

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Average the usable updates, weighted by examples; under DP each counts once."""
        if self.config.strategy.aggregator != "mean":
            return self._aggregate_robustly(server_round, replies)
        total = FixedPointSum(self.size, _LARGEST_VALUE)
        losses = 0.0
        for reply in self.read(replies):
            checked = checked_update(reply.arrays, self.reference, _LARGEST_VALUE)
            update = checked.update
            if update is None:
                self.reject(reply, checked.reason or "malformed")
                continue
            weight = min(self._num_examples(reply), _LARGEST_WEIGHT)
            total.add(update, weight)
            losses += weight * (reply.train_loss or 0.0)
        if total.weight == 0:
            return None, None
        arrays = self.apply_update(server_round, total.total() / total.weight)
        return arrays, self._note_loss(losses / total.weight)

    def apply_update(self, server_round: int, update: Vector) -> ArrayRecord:
        """Move the global adapter by the server optimiser's step.

        Args:
            server_round: Sets the server learning rate.
            update: (d,) mean update in the order of the reference's names.

        Returns:
            The new global adapter, float32.
        """
        step = self.optimizer.step(update, self._server_learning_rate(server_round))
        start = 0
        for name, array in self.reference.items():
            part = step[start : start + array.size].reshape(array.shape)
            self.reference[name] = (array + part).astype(np.float32)
            start += array.size
        return array_record(self.reference)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Make messages that ask a share of the clients for their held-out loss."""
        count = round(self.fraction_evaluate * len(self.population))
        if count == 0:
            return []
        record = ConfigRecord({**dict(config.items()), "server-round": server_round})
        chosen = seeded_cohort(
            self.config.seed, self.population, server_round + 2**31, count
        )
        sent = self._encoded(arrays, server_round)
        content = RecordDict({ARRAYS: sent, CONFIG: record})
        return self._messages(content, chosen, MessageType.EVALUATE, server_round)

    def configure_delivery(
        self, arrays: ArrayRecord, config: ConfigRecord
    ) -> list[Message]:
        """Make messages that bring every client the released adapter.

        Args:
            arrays: The adapter, which is released already.
            config: What every message of the run holds.
        """
        after = self.config.num_server_rounds + 1
        content = RecordDict({ARRAYS: self._encoded(arrays, after), CONFIG: config})
        return self._messages(content, self.population, DELIVER, after)

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Average the clients' losses, weighted by examples, and keep the extremes.

        A client weighs no more than the examples that it was asked to score, whatever
        it claims. A lie about a loss shows as the best or the worst one.
        """
        most = self.config.strategy.evaluate_examples or _LARGEST_WEIGHT
        losses: dict[int, float] = {}
        weights: list[int] = []
        for message in replies:
            reply = read_reply(message, {})
            if reply.eval_loss is None or reply.node_id in losses:
                continue
            losses[reply.node_id] = reply.eval_loss
            weights.append(min(reply.num_examples or 1, most))
        if not losses:
            return None
        return MetricRecord(
            {
                "client-loss": float(
                    np.average(list(losses.values()), weights=weights)
                ),
                "client-loss-best": min(losses.values()),
                "client-loss-worst": max(losses.values()),
                "clients-evaluated": len(losses),
            }
        )

    def summary(self) -> None:
        """Log nothing; the run logs its own summary."""

    def read(self, replies: Iterable[Message]) -> Iterator[Reply]:
        """Decode replies one at a time, and count them; yield those with values."""
        yield from self.decoded(replies, self._read)

    def decoded(
        self, replies: Iterable[Message], decode: Callable[[Message], Reply]
    ) -> Iterator[Reply]:
        """Decode replies one at a time, and count them; yield those with arrays.

        Of one node only the first counts: two would add twice the clipping norm.

        Args:
            replies: The replies of a round.
            decode: Reads one of them; total.
        """
        answered: set[int] = set()
        for message in replies:
            reply = decode(message)
            self.round.answered += 1
            self.round.late += self._is_late(message)
            self.round.bytes_up += reply.num_bytes
            if reply.node_id in answered:
                self.reject(reply, "malformed")
                continue
            answered.add(reply.node_id)
            if reply.code is None:
                self.round.epsilons[reply.node_id] = reply.epsilon
                if self._may_measure and reply.seconds:
                    self.round.note_seconds(reply.seconds)
                yield reply
            else:
                self.reject(reply, reply.code)

    def _encoded(self, arrays: ArrayRecord, server_round: int) -> ArrayRecord:
        """Return the adapter as it travels down."""
        encoding = self.config.wire.encoding
        if encoding == "float32":
            return arrays
        named = read_global(arrays, self.shapes)
        # Rounding what was released is post-processing: it may be done again.
        generator = np.random.default_rng([self.config.seed, server_round])
        return encoded_record(named, encoding, generator)

    def _read(self, message: Message) -> Reply:
        """Return a reply whose arrays are values on top of the present adapter; total."""
        reply = read_reply(message, self.shapes, self.config.wire.encoding)
        if self._is_late(message):
            return self._on_present(reply, self._earlier[message.metadata.group_id])
        return self._as_values(reply)

    def _is_late(self, message: Message) -> bool:
        """Return whether a reply answers a message of an earlier round.

        Its metadata is that of our own message (`server.reply_stream`), not the client's.
        """
        sent_in = message.metadata.group_id
        return sent_in in self._earlier and sent_in != str(self._server_round)

    def _on_present(
        self, reply: Reply, sent: dict[str, npt.NDArray[np.float32]]
    ) -> Reply:
        """Return a late reply's update on top of the present adapter.

        The update is what the client changed of the adapter that it was sent.
        """
        if self.config.wire.encoding != "float32" or reply.arrays is None:
            return self._as_values(reply)
        with np.errstate(all="ignore"):
            values = {
                name: self.reference[name].astype(np.float64)
                + (value.astype(np.float64) - sent[name])
                for name, value in reply.arrays.items()
            }
        return replace(reply, arrays=values)

    def _as_values(self, reply: Reply) -> Reply:
        """Return a reply whose arrays are values, not an update."""
        if self.config.wire.encoding == "float32" or reply.arrays is None:
            return reply
        with np.errstate(all="ignore"):
            values = {
                name: self.reference[name].astype(np.float64) + update
                for name, update in reply.arrays.items()
            }
        return replace(reply, arrays=values)

    def reject(self, reply: Reply, code: str) -> None:
        """Record a reply whose update counts as zero; its text only without DP."""
        text = reply.text if self.config.privacy.unit == "none" else ""
        self.round.rejected.append((reply.node_id, code, text))

    def _num_examples(self, reply: Reply) -> int:
        """Return a client's weight: what it claims, and 1 under DP."""
        return (reply.num_examples or 1) if self._may_measure else 1

    def _note_loss(self, loss: float) -> MetricRecord | None:
        """Record the round's training loss, if clients may report theirs."""
        if not self._may_measure:
            return None
        self.round.train_loss = loss
        return MetricRecord({"train-loss": loss})

    @property
    def _may_measure(self) -> bool:
        return self.config.privacy.unit == "none"

    def _server_learning_rate(self, server_round: int) -> float:
        strategy = self.config.strategy
        return cosine(
            strategy.server_learning_rate,
            strategy.server_learning_rate_min,
            server_round,
            self.config.num_server_rounds,
        )

    def _messages(
        self, content: RecordDict, nodes: list[int], kind: str, server_round: int
    ) -> list[Message]:
        """Make one message a node; all share the arrays, and none its config."""
        return [
            Message(
                content=RecordDict(
                    {**content, CONFIG: own_config(content.config_records[CONFIG])}
                ),
                dst_node_id=node,
                message_type=kind,
                # A message that is too late to count need not be worked on.
                ttl=(
                    self.config.strategy.reply_seconds
                    if kind == MessageType.TRAIN
                    else self.config.strategy.round_timeout
                ),
                group_id=str(server_round),
            )
            for node in nodes
        ]

    def _aggregate_robustly(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Combine the validated replies by a robust aggregator, all at once."""
        kept: list[Message] = []
        losses: list[float] = []
        messages: dict[int, Message] = {}

        def remembered() -> Iterator[Message]:
            for message in replies:
                messages[message.metadata.src_node_id] = message
                yield message

        for reply in self.read(remembered()):
            checked = checked_update(reply.arrays, self.reference, _LARGEST_VALUE)
            if checked.update is None:
                self.reject(reply, checked.reason or "malformed")
                continue
            message = messages.pop(reply.node_id)
            arrays = {k: (reply.arrays or {})[k] for k in self.shapes}
            kept.append(validated_reply(message, arrays, self._num_examples(reply)))
            losses.append(reply.train_loss or 0.0)
        if not kept:
            return None, None
        update = combine_robustly(
            self.config.strategy, server_round, kept, self.reference
        )
        if update is None:
            return None, None
        record = self.apply_update(server_round, update)
        return record, self._note_loss(float(np.mean(losses)))
