"""Small adapters, strategies over them, and the replies of clients."""

import numpy as np
from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict

from fedllm.auditing.harness import ZeroNoise
from fedllm.config_parsing import parse_run_config
from fedllm.privacy.ledger import Ledger, PrivacySettings
from fedllm.strategy.build import make_strategy
from fedllm.wire.masking import masked
from fedllm.wire.messages import (
    ARRAYS,
    METRICS,
    array_record,
    encoded_record,
    read_global,
)
from fedllm.wire.task_identity import set_task_identity

C = 0.5
SHAPES = {"b": (3, 2), "a": (4,)}
START = {name: np.full(shape, 0.25, np.float32) for name, shape in SHAPES.items()}


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
    return strategy.averaging


def answer(message, arrays, num_examples=None):
    content = RecordDict({ARRAYS: array_record(arrays)})
    if num_examples is not None:
        content[METRICS] = MetricRecord(
            {"num-examples": num_examples, "train-loss": float(num_examples)}
        )
    return Message(masked(content), reply_to=message)


def moved(strategy, record):
    new = read_global(record, SHAPES)
    return np.concatenate([(new[k] - START[k]).ravel() for k in SHAPES]).astype(float)


def shifted(amount):
    return {name: value + np.float32(amount) for name, value in START.items()}


def noiseless(tmp_path, n=4):
    # Zero noise is no ledger.
    ledger = open_ledger(tmp_path, 1e-12, n)
    strategy = make_strategy(private(), START, list(range(1, n + 1)), ledger)
    strategy.generator = ZeroNoise()
    return strategy


def packed_answer(message, update, encoding, generator):
    record = encoded_record(update, encoding, generator)
    return Message(masked(RecordDict({ARRAYS: record})), reply_to=message)
