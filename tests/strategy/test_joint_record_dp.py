"""One noise for all clients' records around a round."""

import numpy as np
import pytest
from flwr.app import Message, MetricRecord, RecordDict

from fedllm.auditing.harness import ZeroNoise
from fedllm.errors import PrivacyError
from fedllm.privacy.joint_ledger import JointLedger, JointSettings
from fedllm.privacy.joint_sum import most_records, record_units
from fedllm.strategy.build import make_strategy
from fedllm.strategy.joint_record_dp import JointRecordDP
from fedllm.wire.masking import masked
from fedllm.wire.messages import (
    ARRAYS,
    CONFIG,
    METRICS,
    NOISE_MULTIPLIER,
    TOTAL_ROWS,
    array_record,
)
from tests.helpers.strategies import SHAPES, START, ask, moved, private

D, Z, B, NORM = 10, 1.3, 8, 0.5
ROWS = (20, 40, 100)
U = record_units(D, Z, B)
JOINT = {
    "privacy.unit": "record",
    "privacy.noise": "joint",
    "train.local-steps": 1,
    "privacy.max-grad-norm": NORM,
    "train.batch-size": B,
}


def make(tmp_path, quiet=True, **keys) -> JointRecordDP:
    settings = JointSettings(
        unit="record",
        noise="joint",
        sampling="all",
        population_size=3,
        num_sampled_clients=3,
        declared_rows=ROWS,
        expected_batch_size=B,
        max_grad_norm=NORM,
        noise_multiplier=Z,
        delta=1e-5,
        target_epsilon=0.0,
        max_epsilon=0.0,
        num_trainable=D,
        planned_rounds=3,
    )
    ledger = JointLedger.create(tmp_path / "privacy.json", settings)
    strategy = make_strategy(private(**JOINT, **keys), START, [1, 2, 3], ledger)
    assert isinstance(strategy, JointRecordDP)
    if quiet:
        strategy.generator = ZeroNoise()
    return strategy


def sums(amount):
    """Return a client's sum: one value for all, in units of the grid."""
    return {name: np.full(shape, amount, np.int64) for name, shape in SHAPES.items()}


def answer(message, arrays):
    return Message(masked(RecordDict({ARRAYS: array_record(arrays)})), reply_to=message)


def test_the_step_goes_down_the_mean_over_the_expected_batch(tmp_path):
    strategy = make(tmp_path)
    messages = ask(strategy)

    record, metrics = strategy.aggregate_train(
        1, [answer(message, sums(U // 10)) for message in messages]
    )

    step = moved(strategy, record)
    np.testing.assert_allclose(step, -3 * NORM / 10 / B, rtol=1e-4)
    assert metrics is None
    assert strategy.round.usable == 3


def test_a_message_names_the_public_numbers_that_a_client_pays_by(tmp_path):
    for message in ask(make(tmp_path)):
        config = message.content.config_records[CONFIG]
        assert config[NOISE_MULTIPLIER] == Z
        assert config[TOTAL_ROWS] == sum(ROWS)


@pytest.mark.parametrize("encoding", ["float16", "int8"])
def test_the_way_up_is_exact_whatever_the_way_down(tmp_path, encoding):
    strategy = make(tmp_path, **{"wire.encoding": encoding})
    messages = ask(strategy)

    record, _ = strategy.aggregate_train(1, [answer(messages[0], sums(U // 3 + 1))])

    expected = np.float32(0.25) - (U // 3 + 1) * (NORM / U) / B
    step = moved(strategy, record) + 0.25
    np.testing.assert_array_equal(step.astype(np.float32), np.float32(expected))


def test_noise_is_added_once_for_all_and_a_round_without_replies_is_noise(
    tmp_path, monkeypatch
):
    strategy = make(tmp_path, quiet=False)
    draws = []
    drawn = strategy.generator.discrete_gaussian

    def counted(size):
        draws.append(size)
        return drawn(size)

    monkeypatch.setattr(strategy.generator, "discrete_gaussian", counted)
    messages = ask(strategy)
    strategy.aggregate_train(1, [answer(message, sums(0)) for message in messages])
    record, _ = strategy.aggregate_train(2, [])

    assert draws == [D, D]
    assert record is not None
    assert strategy.ledger.releases == [1, 2]


def test_the_ledger_is_on_disk_before_the_adapter_moves(tmp_path, monkeypatch):
    strategy = make(tmp_path)
    before = {name: value.copy() for name, value in strategy.strategy.reference.items()}

    def full(self):
        raise PrivacyError("disk full")

    replies = [answer(message, sums(U // 8)) for message in ask(strategy)]
    monkeypatch.setattr(JointLedger, "_write", full)
    with pytest.raises(PrivacyError, match="disk full"):
        strategy.aggregate_train(1, replies)
    for name, value in strategy.strategy.reference.items():
        np.testing.assert_array_equal(value, before[name])


def test_no_sum_is_rejected_for_its_norm_and_none_adds_more_than_its_share(tmp_path):
    strategy = make(tmp_path)
    messages = ask(strategy)

    record, _ = strategy.aggregate_train(1, [answer(messages[0], sums(-(2**63)))])

    assert strategy.round.rejected == []
    share = most_records(B * ROWS[0] / sum(ROWS)) * NORM / B
    assert np.linalg.norm(moved(strategy, record)) == pytest.approx(share, rel=1e-4)


def test_what_is_not_of_the_declared_form_counts_as_zero(tmp_path):
    strategy = make(tmp_path)
    messages = ask(strategy)

    record, _ = strategy.aggregate_train(
        1,
        [
            answer(messages[0], START),
            answer(messages[1], {"a": sums(U)["a"]}),
            answer(messages[2], {k: v[:1] for k, v in sums(U).items()}),
        ],
    )

    assert [code for _, code, _ in strategy.round.rejected] == ["malformed"] * 3
    np.testing.assert_array_equal(moved(strategy, record), 0)


def test_the_second_sum_of_a_node_and_what_it_claims_beside_it_do_not_count(tmp_path):
    strategy = make(tmp_path)
    messages = ask(strategy)
    claim = RecordDict({ARRAYS: array_record(sums(U // 8))})
    claim[METRICS] = MetricRecord({"num-examples": 10**6})
    first = Message(masked(claim), reply_to=messages[0])
    second = answer(messages[0], sums(U))

    record, _ = strategy.aggregate_train(1, [first, second])

    np.testing.assert_allclose(moved(strategy, record), -NORM / 8 / B, rtol=1e-4)


def test_a_ledger_of_another_unit_is_no_ledger(tmp_path):
    ledger = make(tmp_path).ledger
    for config in (private(), private(**{"privacy.unit": "record"})):
        with pytest.raises(PrivacyError, match="joint"):
            make_strategy(config, START, [1, 2, 3], ledger)
    with pytest.raises(PrivacyError, match="joint"):
        make_strategy(private(**JOINT), START, [1, 2, 3], None)


def test_noise_alone_goes_through_every_step(tmp_path):
    strategy = make(tmp_path, quiet=False)
    start = {name: value.copy() for name, value in strategy.strategy.reference.items()}

    after = strategy.noise_alone()

    assert any((after[name] != start[name]).any() for name in start)
    assert strategy.ledger.releases == []
    for name, value in strategy.strategy.reference.items():
        np.testing.assert_array_equal(value, start[name])
