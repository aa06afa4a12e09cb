"""A client's part of a sealed step: paid for first, of one form, and under pads."""

import json
from dataclasses import replace

import numpy as np
import pytest
from flwr.app import ConfigRecord

from fedllm.client import message_handler
from fedllm.client.record_budget import ledger_folder
from fedllm.config_parsing import parse_run_config
from fedllm.privacy.agreement import SlotSettings
from fedllm.privacy.pads import integers_of
from fedllm.wire.messages import ARRAYS, CONFIG, METRICS, array_record, read_reply
from fedllm.wire.sealed_messages import PACKETS, SEALED, SLOT, read_residues
from tests.helpers.flower_messages import instruction
from tests.helpers.sealed import SIZE, G, Z, records, sealed, silent

__all__ = ["records", "sealed", "silent"]


def asked(federation, server_round=1, **changes):
    """What the server asks a client of, whose settings it may have forged."""
    reference = federation.strategy.averaging.reference
    message, *_ = federation.strategy.configure_train(
        server_round, array_record(reference), ConfigRecord(), federation.grid
    )
    record = message.content.config_records[CONFIG]
    if changes:
        record[SLOT] = replace(SlotSettings.parse(record[SLOT]), **changes).text
    return instruction(message.content)


def answered(federation, message, partition=3):
    return message_handler.reply_to(message, federation.context(partition))


def code(reply):
    return read_reply(reply, {}).code


def releases(federation):
    """The events of the one ledger of the home: noise, q and steps."""
    folder = ledger_folder(federation.folder / "home", 0, None)
    content = json.loads((folder / "ledger.json").read_text())["content"]
    return content


def form(reply):
    sealed = reply.content.config_records[SEALED]
    vector = reply.content.array_records[ARRAYS][SEALED]
    return (
        sorted(reply.content),
        sorted(sealed),
        [len(packet) for packet in sealed[PACKETS]],
        (vector.dtype, vector.shape, len(vector.data)),
    )


@pytest.mark.parametrize(
    "batch",
    [
        [],
        [0.1] * 30,
        [np.nan],
        MemoryError(),
    ],
)
def test_a_reply_has_one_form_for_every_batch_also_an_empty_one_and_every_failure(
    records, batch
):
    federation = records()
    federation.begin()
    message = asked(federation)
    usual = form(answered(federation, message, partition=2))
    federation.updates[3] = batch

    reply = answered(federation, message)

    assert form(reply) == usual
    assert usual[0] == [ARRAYS, SEALED, "wire"] and usual[2] == [80] * 3
    assert METRICS not in reply.content


def test_a_step_is_on_the_clients_ledger_before_a_coin_is_tossed(records, monkeypatch):
    federation = records()
    federation.begin()

    def die(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(message_handler, "_records", die)
    message = asked(federation)
    with pytest.raises(KeyboardInterrupt):
        answered(federation, message)

    assert releases(federation)["releases"] == [[Z, 4 / 32, 1]]
    # And the slot is answered: a second answer would be opened under one noise with it.
    assert code(answered(federation, message)) == "budget-spent"


def test_a_slot_that_is_asked_again_costs_no_second_step(records):
    federation = records()
    federation.begin()
    message = asked(federation)

    assert code(answered(federation, message)) is None
    before = releases(federation)
    assert code(answered(federation, message)) == "budget-spent"

    assert releases(federation) == before
    assert federation.trained == [3]


def test_a_step_that_passes_its_owners_limit_is_not_taken(records):
    limits = {
        "privacy-unit": "record",
        "privacy-noise": "joint",
        "max-epsilon": 0.01,
        "delta": 1e-5,
        "least-trustees": 3,
        "colluding-trustees": 1,
        "model-name": parse_run_config({}).model.name,
    }
    federation = records(node=limits)
    federation.begin()

    assert code(answered(federation, asked(federation))) == "budget-spent"
    assert federation.trained == []


@pytest.mark.parametrize(
    "changes",
    [
        {"num_records": 0, "total_rows": 0},
        {"num_records": 65},
        {"clipping_norm": G * 2},
        {"noise_multiplier": Z * 0.99},
        {"colluding": 0},
        {"run": "0" * 64},
        {"planned_slots": 4},
        {"adapter": "0" * 64},
    ],
)
def test_settings_that_are_not_the_runs_are_refused_before_anything_is_spent(
    records, changes
):
    federation = records()
    federation.begin()

    reply = answered(federation, asked(federation, **changes))

    assert code(reply) == "failed"
    assert federation.trained == []
    assert not (federation.folder / "home" / "ledgers").exists()


def test_other_numbers_than_in_the_runs_first_step_are_refused(records):
    federation = records()
    federation.begin()
    assert code(answered(federation, asked(federation))) is None

    second = asked(federation, 2, total_rows=4000)

    assert code(answered(federation, second)) == "bad-config"
    assert federation.trained == [3]


def test_fewer_rows_than_a_batch_are_refused(records):
    federation = records()
    federation.begin()

    assert code(answered(federation, asked(federation, total_rows=3))) == "bad-config"
    assert federation.trained == []


def test_after_three_steps_that_failed_no_row_is_looked_at_any_more(records):
    # Each failure, for want of time or memory, tells of the lengths of rows without noise.
    federation = records(**{"num-server-rounds": 4})
    federation.begin()
    federation.updates[3] = MemoryError()
    replies = [answered(federation, asked(federation, r)) for r in range(1, 5)]

    assert federation.trained == [3] * 3
    assert {code(reply) for reply in replies} == {None}
    assert len({str(form(reply)) for reply in replies}) == 1


@pytest.mark.parametrize(
    "node",
    [
        {"privacy-unit": "record", "max-epsilon": 4.0, "delta": 1e-5},
        {"privacy-unit": "client", "max-epsilon": 4.0, "delta": 1e-5},
        {"least-trustees": 3},
        {"privacy-unit": "record", "privacy-noise": "joint", "least-trustees": 4},
        {"privacy-unit": "record", "privacy-noise": "joint", "colluding-trustees": 2},
    ],
)
def test_the_floors_of_the_nodes_owner_hold(records, node):
    federation = records()
    federation.begin()
    message = asked(federation)
    federation.context(3).node_config.update(node)
    federation.context(3).run_config["privacy.delta"] = 1e-5

    assert code(answered(federation, message)) == "bad-config"
    assert federation.trained == []


def test_the_gradients_lie_on_the_grid_that_the_trustees_noise_is_made_for(
    records, silent
):
    federation = records()
    federation.begin()
    federation.updates[3] = [0.01]
    message = asked(federation)
    settings = SlotSettings.parse(message.content.config_records[CONFIG][SLOT])

    answered(federation, message)

    assert federation.units == [settings.grid.sensitivity]
    assert federation.plans[0].sampling_probability == 4 / 32


def test_a_reply_differs_from_itself_without_pads(records, monkeypatch):
    # The control of the test of uniformity: with no pad the integers are read at once.
    from fedllm.client import sealing

    federation = records()
    federation.begin()
    federation.updates[3] = [9.0]
    monkeypatch.setattr(sealing, "add_pad", lambda *_: None)

    reply = answered(federation, asked(federation))

    (units,) = federation.units
    got = integers_of(read_residues(reply, SIZE)[1])
    assert np.abs(np.linalg.norm(got) / units - 1) < 1e-4
