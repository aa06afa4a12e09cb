"""The server's own training on rows declared public, before round 1."""

import json
import logging

import numpy as np
import pytest

from fedllm.errors import ConfigError, DataError
from fedllm.evaluation.public_rows import PublicRows
from tests.helpers.federations import (
    NO_PRIVACY,
    cut_in_round,
    federation,
    learner,
    resumed,
)
from tests.helpers.rows import write_rows


@pytest.fixture
def given(quick, tmp_path):
    public = write_rows(tmp_path / "public.jsonl", 20, 300)
    return {
        **quick,
        "data.public-train": public,
        "train.public-epochs": 2.0,
        "train.public-learning-rate": 0.05,
    }


def privacy_of(run):
    return json.loads((run.directory.path / "privacy.json").read_text())


def test_round_zero_has_learned_the_public_rows_at_no_cost(given, quick, caplog):
    with caplog.at_level(logging.INFO):
        run = federation(given)
    plain = federation(quick)

    assert "before round 1: training on 20 public rows" in caplog.text
    rows = PublicRows(
        run.config, run.directory.path.parent.parent, run.public.adapted()
    )
    # Validation rows are alike, and no public row.
    assert not any(value.any() for value in plain.progress.arrays.values())
    before, after = (
        rows._score("validation", one.progress.arrays).loss for one in (plain, run)
    )
    assert after < before - 0.1
    unlike = {"run", "created"}
    ours, theirs = privacy_of(run), privacy_of(plain)
    assert {k: v for k, v in ours.items() if k not in unlike} == {
        k: v for k, v in theirs.items() if k not in unlike
    }


def test_the_same_seed_gives_the_same_start(given):
    first, second = federation(given), federation(given)
    other = federation({**given, "seed": 5})

    for name, value in first.progress.arrays.items():
        assert np.array_equal(value, second.progress.arrays[name])
    assert any(
        not np.array_equal(value, other.progress.arrays[name])
        for name, value in first.progress.arrays.items()
    )


def test_the_start_is_kept_recommended_and_delivered_if_no_round_beats_it(
    given, monkeypatch
):
    monkeypatch.setattr(
        PublicRows,
        "validation_loss",
        lambda self, arrays: sum(float(np.abs(v).sum()) for v in arrays.values()),
    )

    def shifted(message, context):
        for record in message.content.array_records.values():
            for name, array in record.items():
                record[name] = type(array)(array.numpy() * 5 + 1)
        return learner(message, context)

    run = federation({**given, **NO_PRIVACY}, shifted)
    start = run.progress.arrays

    result = run.run()

    assert result["best_round"] == 0
    assert result["recommended"] == str(run.directory.path / "peft_best")
    assert (run.directory.path / "peft_0").is_dir()
    assert run._best_tuned() == (start, 0)


def test_a_resumed_run_trains_on_no_public_row_again(given, monkeypatch):
    given = {**given, **NO_PRIVACY}
    whole = federation(given)
    whole.run()
    cut_in_round(given, 2)

    def never(*_):
        raise AssertionError

    monkeypatch.setattr("fedllm.server.public_training.train_on_public_rows", never)
    run = resumed()
    run.run()

    for name, value in whole.progress.arrays.items():
        assert np.array_equal(value, run.progress.arrays[name])


@pytest.mark.parametrize("split", ["validation", "test"])
def test_a_row_that_trains_and_scores_is_an_error(given, split):
    given["data.public-train"] = given[f"data.public-{split}"]

    with pytest.raises(
        ConfigError, match=f"data.public-train: . of its rows are {split}"
    ):
        federation({**given, **NO_PRIVACY})


def test_a_clients_row_is_no_public_one(given, tmp_path):
    given["data.public-train"] = write_rows(tmp_path / "mixed.jsonl", 3, 23)

    with pytest.raises(
        ConfigError, match="data.public-train: 1 of its rows also train"
    ):
        federation(given)


def test_one_row_is_too_few(given, tmp_path):
    given["data.public-train"] = write_rows(tmp_path / "one.jsonl", 1, 300)

    with pytest.raises(DataError, match=r"data.public-train: .*one.jsonl has 1 usable"):
        federation(given)
