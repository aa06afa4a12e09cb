"""A client's own best: the passes and the rate that its held-out rows like."""

from dataclasses import replace

import numpy as np
import pytest

from fedllm.config import TrainConfig
from fedllm.errors import DataError
from fedllm.evaluation.held_out_loss import held_out
from fedllm.training.own_best import OwnBestConfig, split_tenth, train_to_own_best
from tests.helpers.clients import Client, Make, assert_same

TRAIN = TrainConfig(batch_size=3, local_steps=1)


@pytest.fixture(scope="module")
def client(make_client: Make) -> Client:
    return make_client()


def search(client, rates, passes=3.0, score=None, examples=None, proximal_mu=0.0):
    def loss(rows):
        return held_out(client.model, rows, client.pad_token_id).loss

    return train_to_own_best(
        client,
        split_tenth(client.examples if examples is None else examples, seed=1),
        client.start(),
        TRAIN,
        OwnBestConfig(rates, passes, seed=1, proximal_mu=proximal_mu),
        score or loss,
    )


def test_the_values_are_those_of_the_best_check_not_of_the_last(client):
    seen = []

    def score(rows):
        # Falls, then rises.
        seen.append((client.get(), len(rows)))
        return abs(len(seen) - 4.0)

    found = search(client, [0.01], score=score)

    assert_same(found.arrays, seen[3][0])
    assert found.losses == [3.0, 2.0, 1.0, 0.0, 1.0, 2.0, 3.0]
    # Nine of ten rows train: three steps a pass, each with a check.
    assert {count for _, count in seen} == {1}
    assert found.num_examples == 9
    assert len(seen) == 7


def test_the_better_learning_rate_is_taken_and_named(client):
    one, two = search(client, [1e-5]), search(client, [0.02])
    both = search(client, [1e-5, 0.02])

    assert min(two.losses) < min(one.losses) < one.losses[0]
    assert both.learning_rate == 0.02 and both.losses == pytest.approx(two.losses)
    assert_same(both.arrays, two.arrays)


def test_a_start_that_nothing_betters_is_the_result(client):
    losses = iter(range(100))
    found = search(client, [0.02, 0.01], score=lambda rows: float(next(losses)))

    assert_same(found.arrays, client.start())
    assert found.learning_rate is None and found.num_examples == 0


def test_the_rows_that_judge_do_not_train(client):
    judged = []
    search(client, [0.02], score=lambda rows: judged.extend(rows) or 1.0)
    tokens = [row["input_ids"] for row in client.examples]
    held = judged[0]["input_ids"]
    assert tokens.count(held) == 1

    # Poisoned with another answer, the row that judges changes nothing that is trained.
    changed = [
        {**row, "labels": [0] * len(row["labels"])} if row["input_ids"] == held else row
        for row in client.examples
    ]
    falling = [iter(range(100, 0, -1)) for _ in range(2)]
    one = search(client, [0.02], score=lambda rows: float(next(falling[0])))
    two = search(
        client, [0.02], score=lambda rows: float(next(falling[1])), examples=changed
    )
    assert_same(one.arrays, two.arrays)
    assert any(np.any(one.arrays[k] != client.start()[k]) for k in one.arrays)


def test_a_client_of_one_row_is_an_error(client):
    with pytest.raises(DataError, match="1 usable rows"):
        search(client, [0.01], examples=client.examples[:1])


def test_the_pull_towards_the_start_keeps_the_values_near_it(client):
    def distance(proximal_mu: float) -> float:
        # Each check is better than the one before: the last values are the result.
        falling = iter(range(100, 0, -1))
        found = search(
            client,
            [0.02],
            score=lambda rows: float(next(falling)),
            proximal_mu=proximal_mu,
        )
        start = client.start()
        return sum(float(np.sum((found.arrays[k] - start[k]) ** 2)) for k in start)

    assert distance(100.0) < distance(0.0) / 2


@pytest.mark.parametrize(
    ("batch_size", "accumulated", "steps"),
    [(1, 128, 3), (3, 128, 3), (2, 1, 3), (9, 1, 1)],
)
def test_a_step_has_a_few_rows_whatever_a_round_accumulates(
    client, batch_size, accumulated, steps
):
    # Nine rows: three steps of four, of three, of four again, or one of nine.
    train = replace(TRAIN, batch_size=batch_size, gradient_accumulation=accumulated)
    losses = []

    def score(rows):
        losses.append(len(losses))
        return float(-len(losses))

    config = OwnBestConfig([0.01], 1.0, seed=1)
    rows = split_tenth(client.examples, seed=1)
    train_to_own_best(client, rows, client.start(), train, config, score)

    # Before the training, and after each step: there are two checks a pass at least.
    assert len(losses) == 1 + steps
