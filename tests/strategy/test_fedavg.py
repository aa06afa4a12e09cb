"""The strategy: who counts how much, and what no client can do."""

import itertools

import numpy as np
import pytest
from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvg

from fedllm.strategy.build import make_strategy
from fedllm.wire.encoding import PACKED
from fedllm.wire.messages import ARRAYS, DELIVER, METRICS, array_record, read_global
from fedllm.wire.task_identity import set_task_identity
from tests.helpers.strategies import (
    SHAPES,
    START,
    C,
    answer,
    ask,
    moved,
    noiseless,
    packed_answer,
    public,
    shifted,
)


def test_without_dp_the_mean_is_weighted_by_examples():
    strategy = make_strategy(public(), START, [1, 2], None)
    first, second = ask(strategy)

    record, metrics = strategy.aggregate_train(
        1, [answer(first, shifted(1.0), 30), answer(second, shifted(0.0), 10)]
    )

    np.testing.assert_allclose(moved(strategy, record), 0.75, atol=1e-6)
    assert metrics["train-loss"] == pytest.approx((30 * 30 + 10 * 10) / 40)


def test_without_dp_the_mean_equals_flowers_fedavg():
    rng = np.random.default_rng(0)
    strategy = make_strategy(public(), START, [1, 2, 3], None)
    replies, plain = [], []
    for message, weight in zip(ask(strategy), (5, 7, 11), strict=True):
        noise = {k: v + rng.normal(size=v.shape).astype("f4") for k, v in START.items()}
        replies.append(answer(message, noise, weight))
        content = RecordDict({ARRAYS: array_record(noise)})
        content[METRICS] = MetricRecord({"num-examples": weight})
        plain.append(Message(content, reply_to=message))

    record, _ = strategy.aggregate_train(1, iter(replies))
    expected, _ = FedAvg(arrayrecord_key=ARRAYS).aggregate_train(1, plain)

    for name in SHAPES:
        np.testing.assert_allclose(
            record[name].numpy(), expected[name].numpy(), atol=1e-6
        )


@pytest.mark.parametrize("encoding", ["float16", "int8"])
def test_rounded_updates_give_the_mean_of_exact_ones_and_go_down_packed(encoding):
    strategy = make_strategy(public(**{"wire.encoding": encoding}), START, [1, 2], None)
    first, second = ask(strategy)
    updates = [{k: np.full_like(v, by) for k, v in START.items()} for by in (1.0, 0.5)]
    generator = np.random.default_rng(0)
    replies = [
        packed_answer(message, update, encoding, generator)
        for message, update in zip((first, second), updates, strict=True)
    ]

    record, _ = strategy.aggregate_train(1, replies)

    np.testing.assert_allclose(moved(strategy, record), 0.75, atol=1e-3)
    sent = first.content.array_records[ARRAYS]
    assert list(sent) == [PACKED]
    received = read_global(sent, SHAPES, encoding)
    for name, value in START.items():
        np.testing.assert_allclose(received[name], value, atol=0.01 * abs(value).max())
    assert strategy.round.bytes_down == 2 * len(sent[PACKED].data)
    assert strategy.round.bytes_up == 2 * len(sent[PACKED].data)


def test_of_two_replies_of_one_node_the_first_counts(tmp_path):
    strategy = noiseless(tmp_path)
    first, *_ = ask(strategy)
    replies = [answer(first, shifted(9.0)), answer(first, shifted(9.0))]

    record, _ = strategy.aggregate_train(1, replies)

    assert np.linalg.norm(moved(strategy, record)) == pytest.approx(C / 4, rel=1e-5)
    assert [code for _, code, _ in strategy.round.rejected] == ["malformed"]


def test_the_result_does_not_depend_on_the_order_of_replies(tmp_path):
    rng = np.random.default_rng(1)
    updates = [
        {k: v + rng.normal(size=v.shape).astype("f4") for k, v in START.items()}
        for _ in range(4)
    ]
    results = []
    for order in itertools.islice(itertools.permutations(range(4)), 0, 24, 5):
        strategy = make_strategy(public(), START, [1, 2, 3, 4], None)
        messages = ask(strategy)
        replies = [answer(messages[i], updates[i], 3 + i) for i in order]
        record, _ = strategy.aggregate_train(1, replies)
        results.append(moved(strategy, record).tobytes())

    assert len(set(results)) == 1


def test_the_server_sends_round_and_learning_rate():
    run = public(
        **{"num-server-rounds": 3, "train.learning-rate": 1.0}
        | {"train.learning-rate-min": 0.5}
    )
    strategy = make_strategy(run, START, [1, 2], None)

    record = ask(strategy, 3)[0].content.config_records["config"]

    assert record["server-round"] == 3
    assert record["learning-rate"] == pytest.approx(0.5)


def test_a_message_lives_as_long_as_its_round(tmp_path):
    keys = {"strategy.round-timeout": 42.0}
    strategy = make_strategy(public(**keys), START, [1, 2], None)

    assert [m.metadata.ttl for m in ask(strategy)] == [42.0, 42.0]


@pytest.mark.parametrize("kind", ["train", "evaluate"])
def test_no_two_messages_of_a_round_share_their_config(kind):
    # A message's id is a hash of its content and of what its receiver can guess.
    strategy = make_strategy(public(), START, [1, 2, 3], None)
    strategy.fraction_evaluate = 1.0
    configure = getattr(strategy, f"configure_{kind}")
    record = array_record(START)

    messages = [
        message
        for _ in range(2)
        for message in configure(1, record, ConfigRecord(), None)
    ]

    configs = {m.content.config_records["config"].object_id for m in messages}
    assert len(messages) == 6
    assert len(configs) == 6
    arrays = {m.content.array_records["arrays"].object_id for m in messages}
    assert len(arrays) == 1


@pytest.mark.parametrize("encoding", ["float32", "int8"])
def test_the_released_adapter_goes_to_each_client_once_and_as_rounds_do(encoding):
    keys = {"wire.encoding": encoding, "strategy.round-timeout": 42.0}
    strategy = make_strategy(public(**keys), START, [1, 2, 3], None)
    set_task_identity()

    messages = strategy.configure_delivery(
        array_record(START), ConfigRecord({"base-model": "digest"})
    )

    assert [m.metadata.dst_node_id for m in messages] == [1, 2, 3]
    assert {m.metadata.message_type for m in messages} == {DELIVER}
    assert {m.metadata.ttl for m in messages} == {42.0}
    configs = [m.content.config_records["config"] for m in messages]
    assert len({config.object_id for config in configs}) == 3
    assert {config["base-model"] for config in configs} == {"digest"}
    for message in messages:
        record = message.content.array_records["arrays"]
        shapes = {name: value.shape for name, value in START.items()}
        sent = read_global(record, shapes, encoding)
        for name, value in START.items():
            np.testing.assert_allclose(sent[name], value, atol=0.02)
