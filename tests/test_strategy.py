"""The strategy: who counts how much, and what no client can do."""

import itertools
import json
import random
import tempfile
from pathlib import Path

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvg

from fedllm.config import parse_run_config
from fedllm.errors import PrivacyError
from fedllm.privacy.ledger import Ledger, PrivacySettings
from fedllm.strategy.build import make_strategy
from fedllm.strategy.client_level_dp import ClientLevelDP
from fedllm.strategy.fedavg import AdapterFedAvg
from fedllm.strategy.server_optimizer import ServerOptimizer, cosine
from fedllm.wire.encoding import PACKED
from fedllm.wire.messages import (
    ARRAYS,
    METRICS,
    array_record,
    encoded_record,
    read_global,
)
from tests.flower_messages import set_task_identity

C = 0.5
SHAPES = {"b": (3, 2), "a": (4,)}
START = {name: np.full(shape, 0.25, np.float32) for name, shape in SHAPES.items()}


def config(**keys):
    return parse_run_config({key.replace("__", "."): v for key, v in keys.items()})


def private(**keys):
    merged = {"privacy.clipping-norm": C, "strategy.server-learning-rate": 1.0}
    merged["strategy.server-learning-rate-min"] = 1.0
    return parse_run_config({**merged, **keys})


def public(**keys):
    merged = {"privacy.unit": "none", "privacy.target-epsilon": 0.0}
    merged["strategy.server-learning-rate"] = 1.0
    merged["strategy.server-learning-rate-min"] = 1.0
    return parse_run_config({**merged, **keys})


def open_ledger(tmp_path, noise_multiplier, n=4, **changes):
    settings = {
        "unit": "client",
        "sampling": "all",
        "population_size": n,
        "num_sampled_clients": n,
        "clipping_norm": C,
        "noise_multiplier": noise_multiplier,
        "delta": 1e-5,
        "target_epsilon": 0.0,
        "max_epsilon": 0.0,
        "num_trainable": 10,
        "planned_rounds": 3,
    }
    return Ledger.create(
        tmp_path / "privacy.json", PrivacySettings(**{**settings, **changes})
    )


def ask(strategy, server_round=1):
    set_task_identity()
    record = array_record(strategy_of(strategy).reference)
    return list(strategy.configure_train(server_round, record, ConfigRecord(), None))


def strategy_of(strategy):
    return strategy.strategy if isinstance(strategy, ClientLevelDP) else strategy


def answer(message, arrays, num_examples=None):
    content = RecordDict({ARRAYS: array_record(arrays)})
    if num_examples is not None:
        content[METRICS] = MetricRecord(
            {"num-examples": num_examples, "train-loss": float(num_examples)}
        )
    return Message(content, reply_to=message)


def moved(strategy, record):
    new = read_global(record, SHAPES)
    return np.concatenate([(new[k] - START[k]).ravel() for k in SHAPES]).astype(float)


def shifted(amount):
    return {name: value + np.float32(amount) for name, value in START.items()}


def noiseless(tmp_path, n=4):
    # A noise so small that float32 rounding hides it; zero noise is no ledger.
    ledger = open_ledger(tmp_path, 1e-12, n)
    return make_strategy(private(), START, list(range(1, n + 1)), ledger)


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
    replies = []
    for message, weight in zip(ask(strategy), (5, 7, 11), strict=True):
        noise = {k: v + rng.normal(size=v.shape).astype("f4") for k, v in START.items()}
        replies.append(answer(message, noise, weight))

    record, _ = strategy.aggregate_train(1, iter(replies))
    expected, _ = FedAvg(arrayrecord_key=ARRAYS).aggregate_train(1, replies)

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


@pytest.mark.parametrize("encoding", ["float16", "int8"])
def test_what_a_packed_update_claims_is_clipped_after_it_is_decoded(tmp_path, encoding):
    ledger = open_ledger(tmp_path, 1e-12)
    config = private(**{"wire.encoding": encoding})
    strategy = make_strategy(config, START, [1, 2, 3, 4], ledger)
    huge = {k: np.full_like(v, 6e4) for k, v in START.items()}
    spoiled = {k: np.full_like(v, np.nan) for k, v in START.items()}
    messages = ask(strategy)
    replies = [
        packed_answer(message, update, encoding, np.random.default_rng(0))
        for message, update in zip(messages, (huge, spoiled), strict=False)
    ]

    record, _ = strategy.aggregate_train(1, replies)

    assert np.linalg.norm(moved(strategy, record)) == pytest.approx(C / 4, rel=1e-5)
    assert [code for _, code, _ in strategy.round.rejected] == ["not-finite"]


def packed_answer(message, update, encoding, generator):
    record = encoded_record(update, encoding, generator)
    return Message(RecordDict({ARRAYS: record}), reply_to=message)


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


def test_under_dp_every_client_counts_once_whatever_it_claims(tmp_path):
    strategy = noiseless(tmp_path)
    messages = ask(strategy)
    small = C / np.sqrt(10) / 2  # every update is within the clip

    record, metrics = strategy.aggregate_train(
        1,
        [
            answer(messages[0], shifted(small), 1_000_000),
            answer(messages[1], shifted(small), 1),
            answer(messages[2], shifted(small)),
            answer(messages[3], shifted(-small), 5),
        ],
    )

    np.testing.assert_allclose(moved(strategy, record), small / 2, rtol=1e-5)
    assert metrics is None


def test_a_missing_client_counts_as_zero_and_n_stays(tmp_path):
    strategy = noiseless(tmp_path)
    messages = ask(strategy)

    record, _ = strategy.aggregate_train(1, [answer(messages[0], shifted(10.0))])

    assert np.linalg.norm(moved(strategy, record)) == pytest.approx(C / 4, rel=1e-5)


def hostile_arrays():
    zero = {k: np.zeros_like(v) for k, v in START.items()}
    nan = {k: v.copy() for k, v in shifted(9.0).items()}
    nan["a"][0] = np.nan
    inf = {k: v.copy() for k, v in shifted(9.0).items()}
    inf["b"][0, 0] = np.inf
    return {
        "the same adapter": START,
        "all zeros": zero,
        "nan": nan,
        "inf": inf,
        "huge": {k: np.full_like(v, 3e38) for k, v in START.items()},
        "huge doubles": {k: np.full(v.shape, 1e308) for k, v in START.items()},
        "reordered": dict(reversed(shifted(9.0).items())),
        "missing": {"a": shifted(9.0)["a"]},
        "extra": {**shifted(9.0), "c": np.ones(3, np.float32)},
        "renamed": {"a": shifted(9.0)["a"], "c": shifted(9.0)["b"]},
        "wrong shape": {"a": shifted(9.0)["a"], "b": np.ones((2, 3), np.float32)},
        "broadcastable": {"a": np.ones(1, np.float32), "b": np.ones((1, 2), "f4")},
        "0-d": {"a": np.array(1.0, np.float32), "b": shifted(9.0)["b"]},
        "integers": {k: np.ones(v.shape, np.int64) for k, v in START.items()},
        "rescaled": {k: v * 1e6 for k, v in START.items()},
        "half": {k: v.astype(np.float16) for k, v in shifted(9.0).items()},
        "denormal": {k: np.full_like(v, 1e-45) for k, v in START.items()},
        "complex": {k: v.astype(np.complex64) for k, v in START.items()},
        "empty": {},
    }


@pytest.mark.parametrize("name", sorted(hostile_arrays()))
def test_no_reply_moves_the_sum_by_more_than_the_clip(tmp_path, name):
    honest = shifted(0.01)
    results = []
    for hostile in (None, hostile_arrays()[name]):
        folder = tmp_path / str(hostile is None)
        folder.mkdir()
        strategy = noiseless(folder)
        messages = ask(strategy)
        replies = [answer(m, honest) for m in messages[1:]]
        if hostile is not None:
            replies.append(answer(messages[0], hostile))
        record, _ = strategy.aggregate_train(1, replies)
        results.append(moved(strategy, record))

    sensitivity = 4 * np.linalg.norm(results[1] - results[0])

    assert sensitivity <= C * (1 + 1e-5)  # float32 of the released adapter
    assert np.isfinite(results[1]).all()


def test_a_reordered_reply_is_the_same_reply(tmp_path):
    outcomes = []
    for arrays in (shifted(0.01), dict(reversed(shifted(0.01).items()))):
        folder = tmp_path / str(len(outcomes))
        folder.mkdir()
        strategy = noiseless(folder)
        record, _ = strategy.aggregate_train(1, [answer(ask(strategy)[0], arrays)])
        outcomes.append(moved(strategy, record))

    np.testing.assert_allclose(outcomes[0], outcomes[1], atol=1e-9)


def test_the_noise_of_the_released_adapter_has_the_promised_scale(tmp_path):
    size, n, z = 40_000, 4, 2.0
    start = {"b": np.zeros(size, np.float32)}
    ledger = open_ledger(tmp_path, z, n)
    strategy = make_strategy(private(), start, [1, 2, 3, 4], ledger)
    ask(strategy)

    record, _ = strategy.aggregate_train(1, [])
    spread = record["b"].numpy().std()

    promised = z * C / n
    # The spread of 40,000 draws is within 1.8 % of the truth with p = 1 - 4e-7.
    assert abs(spread / promised - 1) < 0.018
    assert abs(spread / (1.05 * promised) - 1) > 0.018


def test_noise_never_repeats_even_where_the_global_generators_are_seeded(tmp_path):
    draws = []
    for name in ("x", "y"):
        (tmp_path / name).mkdir()
        random.seed(1)
        np.random.seed(1)  # noqa: NPY002 - what transformers.set_seed does
        strategy = make_strategy(
            private(), START, [1, 2, 3, 4], open_ledger(tmp_path / name, 1.0)
        )
        ask(strategy)
        record, _ = strategy.aggregate_train(1, [])
        draws.append(moved(strategy, record))

    assert not np.isclose(draws[0], draws[1]).any()


def test_the_ledger_is_on_disk_before_the_adapter_leaves(tmp_path, monkeypatch):
    strategy = noiseless(tmp_path)
    ask(strategy)
    seen = []

    def apply_update(server_round, update):
        text = (tmp_path / "privacy.json").read_text()
        seen.append(json.loads(text)["num_rounds"])
        return ArrayRecord()

    monkeypatch.setattr(strategy.strategy, "apply_update", apply_update)
    strategy.aggregate_train(1, [])

    assert seen == [1]


def test_a_round_cannot_be_released_twice(tmp_path):
    strategy = noiseless(tmp_path)
    ask(strategy)
    strategy.aggregate_train(1, [])

    with pytest.raises(PrivacyError):
        strategy.aggregate_train(1, [])


def test_a_round_that_would_pass_max_epsilon_is_not_asked_for(tmp_path):
    run = private(
        **{"privacy.target-epsilon": 0.0, "privacy.noise-multiplier": 1.0}
        | {"privacy.max-epsilon": 6.0}
    )
    ledger = open_ledger(tmp_path, 1.0, max_epsilon=6.0)
    strategy = make_strategy(run, START, [1, 2, 3, 4], ledger)
    strategy.aggregate_train(1, ask(strategy) and [])

    with pytest.raises(PrivacyError, match="max-epsilon"):
        ask(strategy, 2)


def test_under_dp_the_text_of_a_failure_is_not_kept(tmp_path):
    from fedllm.wire.messages import error_content

    strategy = noiseless(tmp_path)
    message = ask(strategy)[0]
    told = Message(error_content("no-data", "patient Smith"), reply_to=message)

    strategy.aggregate_train(1, [told])

    assert strategy.round.rejected == [(1, "no-data", "")]


def test_fixed_cohorts_have_the_promised_size_and_vary(tmp_path):
    keys = {"strategy.sampling": "fixed", "strategy.fraction-train": 0.3}
    ledger = open_ledger(tmp_path, 1.0, 3)
    strategy = make_strategy(private(**keys), START, list(range(1, 11)), ledger)

    cohorts = [
        tuple(m.metadata.dst_node_id for m in ask(strategy, r)) for r in range(1, 30)
    ]

    assert {len(set(cohort)) for cohort in cohorts} == {3}
    assert len(set(cohorts)) > 10


def test_poisson_cohorts_follow_the_binomial(tmp_path):
    from scipy.stats import chisquare

    keys = {"strategy.sampling": "poisson", "strategy.fraction-train": 0.3}
    ledger = open_ledger(tmp_path, 1.0, 1.2, sampling="poisson", population_size=4)
    strategy = make_strategy(private(**keys), START, [1, 2, 3, 4], ledger)

    sizes = [len(ask(strategy, r)) for r in range(3000)]

    expected = 3000 * np.array([0.2401, 0.4116, 0.2646, 0.0756, 0.0081])
    assert chisquare(np.bincount(sizes, minlength=5), expected).pvalue > 1e-5
    assert 0 in sizes


def test_without_dp_the_cohorts_come_from_the_seed():
    keys = {"strategy.sampling": "fixed", "strategy.fraction-train": 0.3}

    def cohorts():
        strategy = make_strategy(public(**keys), START, list(range(1, 11)), None)
        return [[m.metadata.dst_node_id for m in ask(strategy, r)] for r in range(1, 6)]

    assert cohorts() == cohorts()
    assert len({tuple(cohort) for cohort in cohorts()}) > 1


@pytest.mark.parametrize("aggregator", ["median", "trimmed-mean", "krum"])
def test_a_robust_aggregator_ignores_an_outlier(aggregator):
    strategy = make_strategy(
        public(**{"strategy.aggregator": aggregator}), START, [1, 2, 3, 4, 5], None
    )
    messages = ask(strategy)
    replies = [answer(m, shifted(0.1), 1) for m in messages[:4]]
    replies.append(answer(messages[4], shifted(500.0), 1))

    record, _ = strategy.aggregate_train(1, replies)

    np.testing.assert_allclose(moved(strategy, record), 0.1, atol=1e-5)


def test_server_optimizers_follow_their_formulas():
    update = np.array([1.0, -2.0])

    momentum = ServerOptimizer("momentum", 0.5)
    momentum.step(update, 1.0)
    np.testing.assert_allclose(momentum.step(update, 0.1), 0.1 * 1.5 * update)

    adam = ServerOptimizer("adam", 0.9)
    expected = 0.1 * update / (np.sqrt(0.01 * update**2) + 1e-3)
    np.testing.assert_allclose(adam.step(update, 1.0), expected)

    yogi = ServerOptimizer("yogi", 0.9)
    np.testing.assert_allclose(yogi.step(update, 1.0), expected)

    np.testing.assert_allclose(
        ServerOptimizer("none", 0.9).step(update, 2.0), 2 * update
    )


def test_the_learning_rate_falls_as_a_half_cosine():
    assert [cosine(1.0, 0.0, r, 3) for r in (1, 2, 3)] == pytest.approx([1, 0.5, 0])
    assert cosine(0.7, 0.1, 1, 1) == 0.7


def test_the_server_sends_round_and_learning_rate():
    run = public(
        **{"num-server-rounds": 3, "train.learning-rate": 1.0}
        | {"train.learning-rate-min": 0.5}
    )
    strategy = make_strategy(run, START, [1, 2], None)

    record = ask(strategy, 3)[0].content.config_records["config"]

    assert record["server-round"] == 3
    assert record["learning-rate"] == pytest.approx(0.5)


def test_noise_alone_moves_a_twin_and_not_the_adapter(tmp_path):
    strategy = make_strategy(private(), START, [1, 2, 3, 4], open_ledger(tmp_path, 1.0))

    arrays = strategy.noise_alone()

    assert all((arrays[k] != START[k]).all() for k in START)
    assert all((strategy.strategy.reference[k] == START[k]).all() for k in START)
    assert strategy.ledger.epsilons().zero_out == 0


def test_memory_does_not_grow_with_the_number_of_replies(tmp_path):
    import tracemalloc

    size = 20_000
    start = {"b": np.zeros(size, np.float32)}

    def peak(count):
        folder = Path(tempfile.mkdtemp(dir=tmp_path))
        strategy = make_strategy(
            private(), start, list(range(count)), open_ledger(folder, 1.0, count)
        )
        message = ask(strategy)[0]
        tracemalloc.start()
        strategy.aggregate_train(
            1, (answer(message, {"b": np.ones(size, "f4")}) for _ in range(count))
        )
        top = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return top

    peak(10)  # what is imported or cached at first use

    grown = peak(1000) - peak(10)

    assert grown < 0.03 * 990 * size * 4  # 990 replies held would be 79 MB


def test_the_wrapper_is_a_flower_strategy_around_fedavg(tmp_path):
    strategy = noiseless(tmp_path)

    assert isinstance(strategy, ClientLevelDP)
    assert isinstance(strategy.strategy, AdapterFedAvg)
    assert isinstance(strategy.strategy, FedAvg)


def test_privacy_without_a_ledger_is_refused_and_not_silently_plain_fedavg():
    with pytest.raises(PrivacyError, match="no ledger"):
        make_strategy(private(), START, [1, 2, 3, 4], None)


def test_a_message_lives_as_long_as_its_round(tmp_path):
    keys = {"strategy.round-timeout": 42.0}
    strategy = make_strategy(public(**keys), START, [1, 2], None)

    assert [m.metadata.ttl for m in ask(strategy)] == [42.0, 42.0]


def test_yogi_lets_its_second_moment_fall_slowly():
    optimizer = ServerOptimizer("yogi", 0.9)
    optimizer.step(np.array([1.0]), 1.0)
    step = optimizer.step(np.array([0.05]), 1.0)

    # Second moments: 0.01 * 1, then less 0.01 * 0.05**2, for it is above that square.
    first, second = 0.9 * 0.1 + 0.1 * 0.05, 0.01 - 0.01 * 0.05**2
    assert step == pytest.approx(first / (second**0.5 + 1e-3))
