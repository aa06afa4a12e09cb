"""Predictions: the truth lies in their interval, or they are not made."""

from dataclasses import replace

import pytest

from fedllm.config import RunConfig
from fedllm.config_parsing import parse_run_config
from fedllm.planning.frontier import Frontier, Measured, load_frontier
from fedllm.planning.noise import privacy_settings
from fedllm.planning.prediction import Prediction, predict

FRONTIER = load_frontier()
ROWS = FRONTIER.private_rows


def config_of(row: Measured, **more: object) -> RunConfig:
    """The run config of a measured federation."""
    return parse_run_config(
        {
            "num-server-rounds": row.rounds,
            "adapter.kind": row.kind,
            "adapter.rank": row.rank,
            "train.batch-size": row.batch_size,
            "train.local-steps": row.local_steps,
            "train.learning-rate": row.learning_rate,
            "train.learning-rate-min": row.learning_rate,
            "strategy.server-learning-rate": row.server_learning_rate,
            "strategy.server-learning-rate-min": row.server_learning_rate_min,
            "privacy.clipping-norm": row.clipping_norm,
            "privacy.noise-multiplier": row.noise_multiplier,
            "privacy.target-epsilon": 0.0,
            **more,
        }
    )


def predicted(
    config: RunConfig, clients: int, frontier: Frontier = FRONTIER
) -> Prediction:
    return predict(config, privacy_settings(config, clients, 1), frontier)


def without(row: Measured) -> Frontier:
    rows = tuple(other for other in FRONTIER.rows if other is not row)
    return replace(FRONTIER, rows=rows)


def holds(prediction: Prediction, row: Measured) -> bool:
    interval = prediction.interval
    assert interval is not None
    return interval.low <= min(row.test_losses) <= max(row.test_losses) <= interval.high


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.kind}-{row.clients}")
def test_a_row_left_out_is_in_the_interval_or_not_measured(row):
    prediction = predicted(config_of(row), row.clients, without(row))

    assert prediction.interval is None or holds(prediction, row)
    assert prediction.nearest is not row


def test_enough_rows_that_are_left_out_are_predicted():
    made = [
        row
        for row in ROWS
        if predicted(config_of(row), row.clients, without(row)).interval is not None
    ]

    # A rule that predicts nothing would hold the truth too.
    assert len(made) >= 8
    assert {row.clients for row in made} == {20, 100, 300}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.kind}-{row.clients}")
def test_a_row_is_predicted_by_itself(row):
    prediction = predicted(config_of(row), row.clients)

    assert prediction.interval is not None and holds(prediction, row)
    assert prediction.interval.loss == pytest.approx(row.loss)
    assert prediction.nearest is row
    assert prediction.differences == ()


def test_three_rounds_for_twenty_clients_are_not_measured():
    config = config_of(ROWS[0], **{"num-server-rounds": 3})

    prediction = predicted(config, 20)

    # What the noise alone would promise, 2.80, excludes the 3.1 that such runs reach.
    assert prediction.interval is None
    assert (prediction.nearest.clients, prediction.nearest.epsilon) == (20, 8.0)
    assert prediction.differences[0] == "rounds 3 (5)"


@pytest.mark.parametrize(
    ("more", "difference"),
    [
        ({"num-server-rounds": 8}, "rounds 8 (5)"),
        ({"adapter.kind": "lora"}, "adapter.kind lora (ffa-lora)"),
        ({"adapter.rank": 16}, "adapter.rank 16 (8)"),
        ({"train.batch-size": 4}, "train.batch-size 4 (8)"),
        ({"train.local-steps": 5}, "train.local-steps 5 (1)"),
        ({"train.learning-rate": 2.0}, "train.learning-rate 2.0 (1.0)"),
        (
            {"train.learning-rate-min": 0.5},
            "train.learning-rate-min 0.5 (measured: as train.learning-rate)",
        ),
        ({"train.optimizer": "adamw"}, "train.optimizer adamw (measured: sgd)"),
        ({"privacy.clipping-norm": 3.0}, "clipping norm 3 (0.6)"),
        ({"privacy.noise-multiplier": 40.0}, "noise multiplier 40 (4.46)"),
        (
            {"strategy.server-learning-rate-min": 0.05},
            "mean server learning rate 0.325 (0.4)",
        ),
        ({"model.name": "other"}, "model.name other (measured: smollm2-135m-instruct)"),
        (
            {"data.name": "mine.jsonl"},
            "data.name mine.jsonl (measured: wordnet-medical)",
        ),
    ],
)
def test_what_was_not_measured_is_named_and_not_predicted(more, difference):
    prediction = predicted(config_of(ROWS[0], **more), 20)

    assert prediction.interval is None
    assert difference in prediction.differences


@pytest.mark.parametrize("clients", [10, 40, 60, 200])
def test_between_measured_numbers_of_clients_nothing_is_predicted(clients):
    noise = {"privacy.noise-multiplier": ROWS[0].noise_multiplier * clients / 20}

    # The noise level is that of the row, so only the number of clients differs.
    assert predicted(config_of(ROWS[0], **noise), clients).interval is None


def test_noise_between_two_rows_is_interpolated_and_less_sure():
    by_epsilon = {row.epsilon: row for row in ROWS if row.clients == 100}
    config = config_of(
        by_epsilon[2.0],
        **{"privacy.noise-multiplier": 0.0, "privacy.target-epsilon": 1.5},
    )

    interval = predicted(config, 100).interval

    assert interval is not None
    assert by_epsilon[2.0].loss < interval.loss < by_epsilon[1.0].loss
    assert interval.high - interval.low > 0.1


def test_a_step_that_rounds_to_zero_is_not_measured():
    tiny = {
        "strategy.server-learning-rate": 1e-320,
        "strategy.server-learning-rate-min": 0.0,
        "privacy.clipping-norm": 1e-9,
    }

    assert predicted(config_of(ROWS[0], **tiny), 20).interval is None


def test_a_step_other_than_the_measured_one_is_less_sure():
    row = ROWS[0]
    longer = {
        "strategy.server-learning-rate": 0.7,
        "strategy.server-learning-rate-min": 0.7,
    }

    same = predicted(config_of(row), 20).interval
    other = predicted(config_of(row, **longer), 20).interval

    assert same is not None and other is not None
    assert other.high - other.low > same.high - same.low
