"""Planted sentences: exposure by rank, intervals, and what no model saw."""

import math

import numpy as np
import pytest

from fedllm.adapters.adapted_model import load_adapted_model
from fedllm.adapters.peft_model import initial_arrays
from fedllm.auditing import planted
from fedllm.auditing.planted import (
    MOST_EXPOSURE,
    exposure,
    make_planted,
    measure_memory,
    summary,
)
from fedllm.config import fedllm_home
from fedllm.config_parsing import parse_run_config
from fedllm.data.tokens import tokenize
from fedllm.errors import DataError
from fedllm.evaluation.held_out_loss import held_out
from tests.helpers.federations import settings

__all__ = ["settings"]


def test_exposure_is_all_bits_for_the_likeliest_and_none_for_the_least_likely():
    others = list(np.linspace(1.0, 2.0, 63))

    assert exposure([0.5, *others]) == MOST_EXPOSURE == 6.0
    assert exposure([3.0, *others]) == 0.0
    assert exposure([1.0] * 64) == pytest.approx(math.log2(64 / 32.5))


def test_a_secret_that_no_model_saw_has_one_bit_and_a_half_in_the_mean():
    generator = np.random.default_rng(1)
    found = [exposure(list(generator.normal(size=64))) for _ in range(2000)]

    # The standard error is 0.03.
    assert np.mean(found) == pytest.approx(1.4, abs=0.15)


@pytest.mark.parametrize(
    ("recited", "low", "high"), [(0, 0.0, 0.3085), (10, 0.6915, 1.0)]
)
def test_intervals_are_those_of_clopper_and_pearson_and_hold_the_mean(
    recited, low, high
):
    found = summary([0.0, 6.0] * 5, recited)

    assert found.recited_low == pytest.approx(low, abs=1e-4)
    assert found.recited_high == pytest.approx(high, abs=1e-4)
    assert found.exposure_low < found.exposure == 3.0 < found.exposure_high


def test_each_sentence_has_its_own_name_and_secrets_that_differ_and_a_client_in_turn():
    made = make_planted(20, [3, 5], seed=7)

    assert len({one.question for one in made}) == 20
    assert [one.client for one in made[:4]] == [3, 5, 3, 5]
    for one in made:
        assert one.secret in one.answer and len({one.answer, *one.others}) == 64
    assert made == make_planted(20, [3, 5], seed=7) != make_planted(20, [3, 5], 8)


def test_a_sentence_beyond_the_length_is_one_line(settings):
    config = parse_run_config({**settings, "train.max-length": 16})
    adapted = load_adapted_model(config, fedllm_home())
    arrays = initial_arrays(adapted.spec)

    with pytest.raises(DataError, match="train.max-length 16: set a larger one"):
        measure_memory(adapted, arrays, make_planted(1, [0], 1), config)


def test_each_answer_has_the_loss_that_it_has_alone(settings):
    config = parse_run_config(settings)
    adapted = load_adapted_model(config, fedllm_home())
    (one,) = make_planted(1, [0], 1)
    answers = [one.answer, "It is short.", *one.others[:3]]

    together = planted._losses(adapted, answers, one.question, config)
    rows = [{"instruction": one.question, "response": answer} for answer in answers]
    alone = []
    for row in rows:
        (example,) = tokenize([row], adapted.tokenizer, config.data, 512).records
        score = held_out(adapted.model, [example], adapted.pad_token_id)
        alone.append(score.loss * score.num_tokens)
    assert together == pytest.approx(alone, rel=1e-5)
