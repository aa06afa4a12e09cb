"""The personal training: what stops it, what chooses, and from where it starts."""

from dataclasses import replace

import numpy as np
import pytest

from fedllm.adapters.peft_model import initial_arrays
from fedllm.config import PersonalConfig, RunConfig, TrainConfig
from fedllm.evaluation.held_out_loss import held_out
from fedllm.training import personal
from fedllm.training.personal import CANDIDATES, PersonalRows, train_personal
from tests.helpers.clients import Client, Make, assert_same

CONFIG = RunConfig(
    train=TrainConfig(batch_size=3, gradient_accumulation=4, local_steps=1),
    personal=PersonalConfig(epochs=2.0, learning_rate=0.02),
)


@pytest.fixture(scope="module")
def client(make_client: Make) -> Client:
    return make_client()


@pytest.fixture(scope="module")
def rows(client: Client) -> PersonalRows:
    examples = client.examples
    return PersonalRows(examples[:6], examples[6:8], examples[8:])


def loss_of(client):
    return lambda rows: held_out(client.model, rows, client.pad_token_id).loss


def test_it_starts_from_the_shared_adapter_and_is_stopped_by_its_own_rows(client, rows):
    seen = []

    def score(judged):
        seen.append((client.get(), [row["input_ids"] for row in judged]))
        return loss_of(client)(judged)

    made = train_personal(client, rows, client.start(), CONFIG, score)

    assert_same(seen[0][0], client.start())
    stopping = [row["input_ids"] for row in rows.stopping]
    choosing = [row["input_ids"] for row in rows.choosing]
    assert [which for _, which in seen[:-3]] == [stopping] * len(made.search.losses)
    assert [which for _, which in seen[-3:]] == [choosing] * 3
    # Batches are not accumulated: two steps a pass, a check after each.
    assert len(made.search.losses) == 5


@pytest.mark.parametrize("best", CANDIDATES)
def test_the_candidate_with_the_lowest_loss_on_the_rows_that_choose_is_taken(
    best, client, rows
):
    losses = iter(
        [3.0, 2.0, 1.5, 1.2, 1.1] + [0.0 if n == best else 1.0 for n in CANDIDATES]
    )

    made = train_personal(client, rows, client.start(), CONFIG, lambda _: next(losses))

    assert made.choice == best
    expected = {
        "base": initial_arrays(client.spec),
        "shared": client.start(),
        "personal": made.search.arrays,
    }
    assert_same(made.arrays, expected[best])
    assert any(np.any(made.search.arrays[k] != client.start()[k]) for k in made.arrays)


def test_a_training_that_betters_nothing_leaves_the_shared_adapter(client, rows):
    rising = iter(range(100))
    made = train_personal(
        client, rows, client.start(), CONFIG, lambda _: float(next(rising))
    )
    assert_same(made.search.arrays, client.start())

    same = train_personal(client, rows, client.start(), CONFIG, lambda _: 1.0)
    assert same.choice == "base"


def test_losses_that_are_no_numbers_choose_the_base(client, rows):
    """As of an adapter that a server filled with values that are none."""
    losses = iter([float("nan")] * 5 + [3.0, float("nan"), float("nan")])
    made = train_personal(client, rows, client.start(), CONFIG, lambda _: next(losses))
    assert made.choice == "base"


def test_the_settings_of_personal_training_are_read(client, rows, monkeypatch):
    asked = []

    def search(adapted, own, start, train, config, score):
        asked.append(config)
        raise KeyboardInterrupt

    monkeypatch.setattr(personal, "train_to_own_best", search)
    given = PersonalConfig(epochs=3.0, learning_rate=0.004, proximal_mu=0.5)
    with pytest.raises(KeyboardInterrupt):
        train_personal(
            client, rows, client.start(), replace(CONFIG, personal=given), len
        )

    (config,) = asked
    assert config.learning_rates == (0.004,)
    assert (config.passes, config.proximal_mu, config.seed) == (3.0, 0.5, CONFIG.seed)
