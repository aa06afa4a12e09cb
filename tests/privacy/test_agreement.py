"""Settings have one form, and a trustee's key is nobody else's."""

import hashlib
import json
from dataclasses import replace

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedllm.errors import ConfigError, PrivacyError
from fedllm.privacy.agreement import (
    Certificate,
    SlotSettings,
    certificates_text,
    parse_certificates,
    parse_pin,
    pin_of,
)
from fedllm.privacy.pads import SealingKey

# No chance in these: tests are named by them.
KEY = SealingKey(bytes(range(32))).public.hex()
SETTINGS = SlotSettings(
    run="r" * 64,
    slot=2,
    planned_slots=5,
    size=1000,
    num_clients=20,
    clipping_norm=0.6,
    noise_multiplier=1.342,
    colluding=1,
    trustees=(("a", KEY), ("b", "11" * 32), ("c", "22" * 32)),
    adapter="0" * 64,
)
CHANGES = {
    "run": "s" * 64,
    "slot": 3,
    "planned_slots": 6,
    "size": 1001,
    "num_clients": 21,
    "clipping_norm": 0.6000000000000001,
    "noise_multiplier": 1.3420000000000003,
    "colluding": 0,
    "trustees": (("a", KEY), ("b", "11" * 32), ("c", "23" * 32)),
    "adapter": "1" * 64,
    "num_records": 66,
    "total_rows": 600,
}
IDENTITY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
PINS = {"a": pin_of(IDENTITY.public_key())}
SIGNED = Certificate("r", "a", KEY, 1000).signed_by(IDENTITY)


@pytest.mark.parametrize("name", CHANGES)
def test_every_setting_is_in_the_context(name):
    changed = replace(SETTINGS, **{name: CHANGES[name]})

    assert changed.context != SETTINGS.context
    assert set(CHANGES) == set(SETTINGS.__dataclass_fields__)


def test_the_context_is_the_hash_of_one_form():
    text = (
        '{"adapter":"' + "0" * 64 + '","clipping_norm":"0x1.3333333333333p-1",'
        '"colluding":1,"noise_multiplier":"0x1.578d4fdf3b646p+0","num_clients":20,'
        '"num_records":0,"planned_slots":5,"run":"'
        + "r" * 64
        + '","size":1000,"slot":2,"total_rows":0,"trustees":'
        f'[["a","{KEY}"],["b","{"11" * 32}"],["c","{"22" * 32}"]]}}'
    )

    assert SETTINGS.text == text
    label = b"fedllm sealed slot 1\0"
    assert SETTINGS.context == hashlib.sha256(label + text.encode()).digest()
    assert SlotSettings.parse(text) == SETTINGS


@pytest.mark.parametrize(
    "text",
    [
        None,
        7,
        "",
        "[]",
        "{}",
        "[" * 50_000,
        SETTINGS.text + " ",
        SETTINGS.text.replace('"slot":2', '"slot":2.0'),
        SETTINGS.text.replace('"slot":2', '"slot":true'),
        SETTINGS.text.replace('"slot":2', '"slot":"2"'),
        SETTINGS.text.replace('"colluding":1', '"colluding":null'),
        SETTINGS.text.replace('"adapter"', '"other":1,"adapter"'),
        SETTINGS.text.replace("0x1.3333333333333p-1", "0.6"),
        json.dumps({**json.loads(SETTINGS.text), "run": ["r"]}),
    ],
)
def test_what_is_not_the_one_form_is_refused(text):
    with pytest.raises(PrivacyError, match="cannot be read"):
        SlotSettings.parse(text)


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"slot": 6}, "5 were planned"),
        ({"slot": 0}, "5 were planned"),
        ({"slot": -1}, "5 were planned"),
        ({"trustees": (("a", KEY), ("a", "11" * 32))}, "twice"),
        ({"colluding": 3}, "at least one is honest"),
        ({"noise_multiplier": 0.0}, "noise"),
        ({"noise_multiplier": float("nan")}, "noise"),
        ({"size": 2**40}, "at most"),
        ({"num_clients": 10**8}, "does not fit"),
        ({"num_records": 10**8}, "does not fit"),
        ({"num_clients": 0, "num_records": 9}, "has clients"),
        ({"num_records": -1}, "no fewer than 0 records"),
        ({"total_rows": -1}, "no fewer than 0 records"),
    ],
)
def test_settings_of_no_federation_are_refused(changes, what):
    with pytest.raises(PrivacyError, match=what):
        SlotSettings.parse(replace(SETTINGS, **changes).text)


def test_a_trustees_key_is_taken_from_its_pinned_identity_alone():
    SIGNED.verify("r", PINS, 999)
    stranger = Ed25519PrivateKey.generate()
    for certificate, what in (
        (replace(SIGNED, name="b"), "trusts no trustee 'b'"),
        (replace(SIGNED, run="s"), "of run 's'"),
        (replace(SIGNED, key="11" * 32), "not signed"),
        (replace(SIGNED, expires=2000), "not signed"),
        (replace(SIGNED, signature="00" * 64), "not signed"),
        (replace(SIGNED, signature=""), "not signed"),
        (replace(SIGNED, signature="no hex"), "not signed"),
        (Certificate("r", "a", KEY, 1000).signed_by(stranger), "not signed"),
    ):
        with pytest.raises(PrivacyError, match=what):
            certificate.verify("r", PINS, 999)
    with pytest.raises(PrivacyError, match="expired"):
        SIGNED.verify("r", PINS, 1000)


def test_certificates_travel():
    assert parse_certificates(certificates_text([SIGNED])) == (SIGNED,)


@pytest.mark.parametrize(
    "text",
    [
        None,
        b"[]",
        "{",
        "[1]",
        "[{}]",
        certificates_text([replace(SIGNED, key="11" * 31)]),
        certificates_text([replace(SIGNED, key="x")]),
        certificates_text([SIGNED]).replace("1000", "1000.5"),
        certificates_text([SIGNED]).replace('"a"', "1"),
    ],
)
def test_what_is_no_certificate_is_refused(text):
    with pytest.raises(PrivacyError, match="certificates"):
        parse_certificates(text)


def test_a_pin_is_43_characters():
    assert len(PINS["a"]) == 43
    assert parse_pin(PINS["a"]) == IDENTITY.public_key().public_bytes_raw()
    # The last has the key of 43 times A in another form.
    for text in ("", "A" * 42 + "B", "A" * 42, "A" * 44, "é" * 43):
        with pytest.raises(ConfigError, match="43 characters"):
            parse_pin(text)
