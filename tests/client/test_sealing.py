"""A client seals to trustees that its owner knows, once a slot, and nothing else leaves."""

import json
from dataclasses import replace

import numpy as np
import pytest
from flwr.app import ConfigRecord, Message, RecordDict

from fedllm.client import message_handler
from fedllm.client.trustee import load_identity
from fedllm.node.delivered_app import CHOICE
from fedllm.privacy.agreement import (
    SlotSettings,
    certificates_text,
    parse_certificates,
)
from fedllm.privacy.pads import SealingKey
from fedllm.wire.messages import (
    ARRAYS,
    CONFIG,
    WIRE_FORMAT_KEY,
    array_record,
    read_reply,
)
from fedllm.wire.sealed_messages import CERTIFICATES, SEALED, SLOT
from tests.helpers.flower_messages import instruction
from tests.helpers.identities import write_identity
from tests.helpers.sealed import SIZE, sealed, silent
from tests.helpers.strategies import START

__all__ = ["sealed", "silent"]


def asked(federation, change=None, kind="train"):
    """What the server asks a client of, changed; nobody has answered it yet."""
    reference = federation.strategy.averaging.reference
    message, *_ = federation.strategy.configure_train(
        1, array_record(reference), ConfigRecord(), federation.grid
    )
    if change is not None:
        change(message.content.config_records[CONFIG], message)
    return instruction(message.content, kind)


def answered(federation, message, partition=3):
    return read_reply(
        message_handler.reply_to(message, federation.context(partition)), {}
    )


def with_settings(**changes):
    """Change the slot's settings as a server would that forges them whole."""

    def change(record, message):
        settings = replace(SlotSettings.parse(record[SLOT]), **changes)
        record[SLOT] = settings.text
        kept = {name for name, _ in settings.trustees}
        entries = parse_certificates(record[CERTIFICATES])
        record[CERTIFICATES] = certificates_text(
            [entry for entry in entries if entry.name in kept]
        )

    return change


def test_an_honest_slot_is_answered_with_values_and_packets_alone(sealed):
    federation = sealed()
    federation.begin()

    reply = message_handler.reply_to(asked(federation), federation.context(3))

    assert set(reply.content) == {ARRAYS, SEALED, "wire"}
    assert list(reply.content.array_records[ARRAYS]) == [SEALED]
    assert set(reply.content.config_records[SEALED]) == {"packets", "nonce"}


def test_every_trustee_gets_a_seed_of_its_own_and_no_message_repeats_one(sealed):
    # A seed that two trustees share is known once one of them tells it.
    federation = sealed()
    federation.begin()
    message = asked(federation)
    settings = SlotSettings.parse(message.content.config_records[CONFIG][SLOT])

    seeds = []
    for partition in (2, 3):
        reply = message_handler.reply_to(message, federation.context(partition))
        packets = reply.content.config_records[SEALED]["packets"]
        for name, packet in zip(settings.names, packets, strict=True):
            path = federation.folder / "home" / "trustees" / name / "ledger.json"
            (run,) = json.loads(path.read_text())["content"]["runs"].values()
            key = SealingKey(bytes.fromhex(run["key"]))
            seeds.append(key.open(packet, settings.info(name)))

    assert None not in seeds
    assert len(set(seeds)) == 6


def test_a_slot_is_answered_once_by_a_client(sealed):
    # Two updates under one noise would cost four times one, and be charged as twice.
    federation = sealed()
    federation.begin()
    message = asked(federation)

    assert answered(federation, message).code is None
    assert answered(federation, message).code == "budget-spent"
    assert federation.trained == [3]
    # Each client for itself: another of the same home answers.
    assert answered(federation, message, partition=2).code is None


def test_the_slot_is_spent_before_anything_is_computed(sealed, monkeypatch):
    federation = sealed()
    federation.begin()
    message = asked(federation)

    def die(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(message_handler, "_update_alone", die)
    with pytest.raises(KeyboardInterrupt):
        answered(federation, message)
    monkeypatch.setattr(message_handler, "_update_alone", federation.train)

    assert answered(federation, message).code == "budget-spent"


@pytest.mark.parametrize(
    "changes",
    [
        {"run": "0" * 64},
        {"slot": 2},
        {"planned_slots": 4},
        {"noise_multiplier": 1.99},
        {"noise_multiplier": 1e-9},
        {"clipping_norm": float("inf")},
        {"colluding": 0},
        {"adapter": "0" * 64},
        {"num_records": 66, "total_rows": 600},
    ],
)
def test_settings_that_promise_less_are_refused_before_anything_is_spent(
    sealed, changes
):
    federation = sealed()
    federation.begin()
    message = asked(federation, with_settings(**changes))

    assert answered(federation, message).code == "failed"
    assert federation.trained == []
    assert not (federation.folder / "home" / "ledgers").exists()


def test_fewer_trustees_than_are_demanded_are_refused(sealed):
    federation = sealed()
    federation.begin()

    def change(record, message):
        trustees = SlotSettings.parse(record[SLOT]).trustees
        with_settings(trustees=trustees[:2])(record, message)

    assert answered(federation, asked(federation, change)).code == "failed"


def test_another_adapter_than_the_settings_name_is_refused(sealed):
    federation = sealed()
    federation.begin()

    def change(record, message):
        other = {name: value + np.float32(1) for name, value in START.items()}
        message.content[ARRAYS] = array_record(other)

    assert answered(federation, asked(federation, change)).code == "failed"
    assert federation.trained == []


def test_a_key_that_no_pinned_trustee_signed_is_refused(sealed):
    federation = sealed()
    federation.begin()

    def change(record, message):
        entries = list(parse_certificates(record[CERTIFICATES]))
        # The server puts its own key in the place of a trustee's.
        entries[1] = replace(entries[1], key="11" * 32)
        named = tuple((entry.name, entry.key) for entry in entries)
        record[SLOT] = replace(SlotSettings.parse(record[SLOT]), trustees=named).text
        record[CERTIFICATES] = certificates_text(entries)

    assert answered(federation, asked(federation, change)).code == "failed"
    assert federation.trained == []


def test_a_slot_of_another_run_is_refused_even_if_its_trustees_signed_for_that(sealed):
    # Two runs of a client's ledger in one slot would be opened under one noise.
    federation = sealed()
    federation.begin()

    def change(record, message):
        other = "0" * 64
        record[SLOT] = replace(SlotSettings.parse(record[SLOT]), run=other).text
        record[CERTIFICATES] = certificates_text(
            [
                replace(entry, run=other).signed_by(
                    load_identity(federation.folder / entry.name)
                )
                for entry in parse_certificates(record[CERTIFICATES])
            ]
        )

    assert answered(federation, asked(federation, change)).code == "failed"
    assert federation.trained == []


def test_certificates_of_other_keys_than_the_settings_are_refused(sealed):
    federation = sealed()
    federation.begin()

    def change(record, message):
        settings = SlotSettings.parse(record[SLOT])
        named = (settings.trustees[0], ("b", "11" * 32), settings.trustees[2])
        record[SLOT] = replace(settings, trustees=named).text

    assert answered(federation, asked(federation, change)).code == "failed"


def test_a_trustee_whom_the_owner_does_not_know_is_refused(sealed):
    federation = sealed()
    federation.begin()
    node = federation.context(3).node_config
    node["trusted-trustees"] = node["trusted-trustees"].rpartition(",")[0]

    assert answered(federation, asked(federation)).code == "failed"
    assert federation.trained == []


def test_a_key_of_the_other_kind_is_refused(sealed):
    federation = sealed()
    federation.begin()
    federation.context(3).run_config["privacy.post-quantum"] = True

    assert answered(federation, asked(federation)).code == "failed"


@pytest.mark.parametrize(
    "changes",
    [
        {"least-trustees": 4},
        {"colluding-trustees": 2},
        {"max-epsilon": 0.1, "delta": 1e-5},
    ],
)
def test_the_floors_of_the_nodes_owner_hold(sealed, changes):
    federation = sealed()
    federation.begin()
    federation.context(3).node_config.update(changes)

    assert answered(federation, asked(federation)).code == "bad-config"
    assert federation.trained == []


def test_a_node_whose_app_the_server_chooses_takes_no_part(sealed, monkeypatch):
    federation = sealed()
    federation.begin()
    message = asked(federation)
    for choice in ("any", None):
        if choice is None:
            monkeypatch.delenv(CHOICE)
        else:
            monkeypatch.setenv(CHOICE, choice)
        assert answered(federation, message).code == "bad-config"
    assert federation.trained == []


def test_a_node_without_pins_takes_no_part(sealed):
    federation = sealed()
    federation.begin()
    del federation.context(3).node_config["trusted-trustees"]

    assert answered(federation, asked(federation)).code == "bad-config"


@pytest.mark.parametrize("kind", ["evaluate", "query", "query.other", "train.other"])
def test_a_sealed_run_asks_for_nothing_else(sealed, kind):
    federation = sealed()
    federation.begin()

    assert answered(federation, asked(federation, kind=kind)).code == "bad-config"
    assert federation.trained == []


def test_a_node_that_demands_trustees_takes_part_in_no_other_run(sealed):
    federation = sealed()
    context = federation.context(3)
    context.node_config["least-trustees"] = 2
    context.run_config |= {"privacy.trust": "server", "privacy.trustees": ""}
    context.run_config["privacy.post-quantum"] = True
    content = RecordDict({CONFIG: ConfigRecord({WIRE_FORMAT_KEY: 2})})

    reply = message_handler.reply_to(instruction(content), context)

    assert read_reply(reply, {}).code == "bad-config"


def test_a_trustee_tallies_only_what_the_run_promises(sealed):
    federation = sealed()
    federation.begin()
    message = asked(federation, with_settings(noise_multiplier=1.0))

    reply = message_handler.reply_to(
        Message(message.content, dst_node_id=100, message_type="query.tally"),
        federation.context(0),
    )

    assert read_reply(reply, {}).code == "failed"


def test_who_is_no_trustee_tallies_nothing(sealed):
    federation = sealed()
    federation.begin()

    assert answered(federation, asked(federation, kind="query.tally")).code == (
        "bad-config"
    )


def test_hello_names_the_run_that_the_node_is_asked_for(sealed):
    federation = sealed()
    content = RecordDict(
        {CONFIG: ConfigRecord({WIRE_FORMAT_KEY: 2, "run-name": "other"})}
    )

    assert answered(federation, instruction(content, "query.hello"), 0).code == "failed"


def test_the_tally_imports_no_torch(sealed):
    # Starting torch would cost each round seconds on every trustee.
    import subprocess
    import sys

    code = (
        "import sys, fedllm.client.sealing, fedllm.client.message_handler; "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_simulated_trustees_have_keys_in_a_folder_of_the_run(sealed, silent):
    federation = sealed()
    for index, context in enumerate(federation.grid.contexts.values()):
        context.node_config = {"partition-id": index, "num-partitions": 4}
    federation.updates = dict.fromkeys(range(4), 0.02)
    federation.begin()

    assert federation.round() == pytest.approx(np.full(SIZE, 0.02), abs=5e-6)
    (folder,) = (federation.folder / "home" / "simulated").iterdir()
    assert sorted(p.name for p in folder.glob("*.key")) == ["a.key", "b.key", "c.key"]


def test_a_real_node_never_takes_a_simulations_keys(sealed):
    federation = sealed()
    _, pin = write_identity(federation.folder, "z")
    node = federation.context(3).node_config
    # The first trustee's pin is another's: its certificate is a stranger's.
    node["trusted-trustees"] = node["trusted-trustees"].replace(
        federation.pins["a"], pin
    )
    federation.begin()

    assert answered(federation, asked(federation)).code == "failed"
