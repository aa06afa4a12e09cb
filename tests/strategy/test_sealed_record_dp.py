"""A sealed step: the exact sum over all coins, the trustees' noise, and no other message."""

import numpy as np
import pytest

from fedllm.client import message_handler
from fedllm.privacy.joint_sum import largest_batch
from fedllm.strategy.sealed_record_dp import SealedRecordDP
from fedllm.wire.sealed_messages import HELLO, TALLY
from tests.helpers.sealed import SIZE, B, G, Z, records, sealed, silent

__all__ = ["records", "sealed", "silent"]


def test_a_step_is_the_sum_of_all_records_that_the_coins_chose(records, silent):
    federation = records()
    # The longest is clipped, one batch is empty, and one training fails.
    federation.updates = {0: [0.01, 0.02], 1: [], 2: MemoryError(), 3: [9.0]}
    strategy = federation.begin()
    federation.grid.sent.clear()

    moved = federation.round()

    assert isinstance(strategy, SealedRecordDP)
    whole = 0.01 + 0.02 + G / np.sqrt(SIZE)
    assert moved == pytest.approx(np.full(SIZE, -whole / B), abs=5e-6)
    assert strategy.round.rejected == []
    kinds = [message.metadata.message_type for message in federation.grid.sent]
    assert sorted(kinds) == [TALLY] * 3 + ["train"] * 4


def test_the_values_of_a_gradient_keep_their_places(records, silent):
    federation = records()
    gradient = np.arange(SIZE) / 1000
    federation.updates = {0: [gradient]}
    federation.begin()

    assert federation.round() == pytest.approx(-gradient / B, abs=5e-6)


def test_a_sum_has_room_for_more_records_than_any_batch_has(records):
    strategy = records().begin()

    units = strategy.units

    # 4 expected; a batch above 38 has a probability below 1e-11.
    assert units.num_records == largest_batch(B) == 38
    assert (units.num_clients, units.total_rows, units.norm) == (4, 32, G)
    assert strategy.reach([100, 101]) < strategy.reach(strategy.strategy.population)


def test_the_released_step_has_the_noise_of_all_trustees(records):
    strategy = records().begin()

    noise = np.concatenate([strategy.noised_update([]) for _ in range(400)])

    expected = Z * np.sqrt(3 / 2) * G / B
    assert noise.std() / expected == pytest.approx(1, abs=0.05)


def test_one_record_more_is_within_what_the_honest_trustees_noise_is_made_for(
    records, silent
):
    # Whatever the record: the grid's A, in integers, and its noise is at least z A.
    federation = records()
    federation.updates = {0: [0.01]}
    strategy = federation.begin()
    without = federation.round(1)
    federation.updates = {0: [0.01, 1e9]}
    with_it = federation.round(2)

    change = np.linalg.norm(with_it - without) * B / G
    # The adapter is float32, whose rounding is all that is above one.
    assert 0.999 < change < 1 + 1e-5
    assert strategy.ledger.releases == [1, 2]


def test_clients_that_send_far_too_much_are_seen_in_the_sums_length(
    records, monkeypatch
):
    from fedllm.client import sealed_records

    federation = records()
    federation.begin()
    honest = sealed_records._batch

    def cheat(client, settings, work):
        integers = honest(client, settings, work)
        integers[0] += 400 * settings.grid.sensitivity
        return integers

    monkeypatch.setattr(sealed_records, "_batch", cheat)

    assert federation.round() is None


def test_a_client_that_declares_nothing_is_no_client(records, caplog):
    federation = records()
    del federation.context(3).node_config["declared-rows"]

    federation.begin()

    assert federation.population == [100, 101, 102]
    assert "node 103: takes no part, since it declared no rows" in caplog.text


def test_rows_are_declared_with_the_hello_and_nothing_else_is_asked(records):
    federation = records()
    federation.answer = message_handler.reply_to

    strategy = federation.begin()

    kinds = [message.metadata.message_type for message in federation.grid.sent]
    assert kinds == [HELLO] * 4
    assert strategy.ledger.settings.declared_rows == (8,) * 4
