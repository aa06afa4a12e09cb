"""The checks of a sealed run's clients: what is below their pads, the pads, and what they refuse."""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np
from flwr.app import ConfigRecord, Message, RecordDict

from fedllm.auditing.harness import Finding, flat_values
from fedllm.auditing.hostile_replies import hostile_arrays
from fedllm.auditing.sealed_bench import (
    SealedBench,
    SealedSetup,
    pad,
    residues_of,
)
from fedllm.errors import FedllmError
from fedllm.privacy.agreement import (
    Certificate,
    SlotSettings,
    certificates_text,
    parse_certificates,
)
from fedllm.privacy.discrete_gaussian import variance_of_two
from fedllm.privacy.mechanism import Integers, Vector
from fedllm.wire.messages import ARRAYS, CONFIG, array_record
from fedllm.wire.sealed_messages import CERTIFICATES, PACKETS, SEALED, SLOT

_SMALL = 64
_DIRECTIONS = 24
"""Updates on the clip in random directions. A value rounded to the nearest integer makes one
of two longer than allowed, and so is missed once in 2^24."""
_HALF = 1 << 31
# A correct client fails the statistical check of its pads with at most this probability.
_BY_CHANCE = 1e-9
_ROUNDING = 1e-9


def grid(setup: SealedSetup) -> Finding:
    """Compare the public grid with what the promise asks of it, in exact arithmetic."""
    with setup.bench(setup.dimension) as bench:
        bench.cohort(1)
        slot = bench.slot
    honest = len(slot.trustees) - slot.colluding
    spread, units = slot.grid.spread, slot.grid.sensitivity
    room = honest * variance_of_two(spread) - 4
    z = Fraction(setup.settings.noise_multiplier)
    enough = (units * z) ** 2 <= room
    tight = ((units + 3) * z) ** 2 > room
    noise = 10 * (len(slot.trustees) * variance_of_two(spread)) ** 0.5
    fits = slot.num_clients * units + noise < _HALF
    return enough and tight and fits, (
        f"A = {units:,} units for one clip, and the noise of {honest} honest trustees of "
        f"{len(slot.trustees)} is {'enough' if enough else 'TOO LITTLE'} for it (exact)"
        f"{'' if tight else ', and MORE than is promised'}; {slot.num_clients} clients and "
        f"10 deviations of noise {'fit' if fits else 'DO NOT FIT'} modulo 2^32"
    )


def clipped_integers(setup: SealedSetup) -> Finding:
    """Open what clients send whose training returns anything at all."""
    clip = setup.settings.clipping_norm
    with setup.bench(_SMALL) as bench:
        kinds = dict(hostile_arrays(bench.start, clip))
        draw = np.random.default_rng(0)
        for number in range(_DIRECTIONS):
            update = draw.normal(size=_SMALL)
            update *= 3 * clip / np.linalg.norm(update)
            kinds[f"direction {number}"] = bench.update(update)
            kinds[f"direction {number}, a tenth of C"] = bench.update(update / 30)
    worst, late, count = (0.0, ""), "", 0
    with setup.bench(_SMALL, len(kinds)) as bench, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # NumPy warns of what does not fit a float32.
        nodes = bench.cohort(1)
        for kind, arrays in list(kinds.items())[: len(nodes)]:
            integers = bench.integers(bench.trained(nodes[count], arrays))
            count += 1
            squares = sum(int(value) ** 2 for value in integers)
            limit = bench.grid.sensitivity**2
            worst = max(worst, (float(Fraction(squares, limit)) ** 0.5, kind))
            if kind.startswith("direction") and not _is_cut(bench, arrays, integers):
                late = late or kind
    passed = worst[0] <= 1 and not late
    return passed, (
        f"of {count} results of a training none is longer below its pads than C, in exact "
        f"integers: {worst[0]:.9f} C ({worst[1]!r}); honest ones arrive "
        + (f"CHANGED ({late})" if late else "whole, cut toward zero")
    )


def _is_cut(bench: SealedBench, arrays: Mapping[str, Any], integers: Integers) -> bool:
    """Return whether integers are an update clipped as a whole, then cut toward zero."""
    names = sorted(bench.reference)
    update: Vector = flat_values(arrays, names) - flat_values(bench.reference, names)
    clip = bench.settings.clipping_norm
    scale = min(1.0, clip / float(np.linalg.norm(update)))
    wanted = np.abs(update) * scale * (bench.grid.sensitivity / clip)
    size = np.abs(integers)
    is_below = np.all(size <= wanted * (1 + _ROUNDING))
    is_near = np.all(size >= wanted * (1 - _ROUNDING) - 1)
    same_sign = np.all(integers * update >= 0)
    return bool(is_below and is_near and same_sign)


def pads(setup: SealedSetup) -> Finding:
    """Look for a seed that serves twice, and for structure below one pad alone."""
    setup, size = setup.planning(2), 1024
    seeds: list[bytes | None] = []
    missing = [np.zeros(256) for _ in range(setup.settings.trustees + 1)]
    number, longest = 0, 0.0
    with setup.bench(size, 4) as bench:
        for server_round in (1, 2):
            for node in bench.cohort(server_round):
                content = bench.content(node, np.zeros(size))
                number += 1
                own = bench.seeds(content)
                seeds += own
                left = residues_of(content)
                missing[-1] += _bytes(left)
                for place in range(len(own)):
                    others = [s for s in own[:place] + own[place + 1 :] if s]
                    half = left - sum(pad(s, size) for s in others)
                    missing[place] += _bytes(np.asarray(half, np.uint32))
                below = np.abs(bench.integers(content)).max()
                longest = max(longest, float(below))
    chance = min(1.0, min(map(_even, missing)) * len(missing))
    fresh = None not in seeds and len(set(seeds)) == len(seeds)
    return fresh and chance > _BY_CHANCE and longest == 0, (
        f"{len(seeds)} seeds of {number} replies in two slots are "
        f"{'all different' if fresh else 'NOT ALL DIFFERENT'}; with any one pad left on, "
        f"what is sent is even (p = {chance:.2g}; below {_BY_CHANCE:g} fails); with all of "
        f"them off an update of zero is {longest:g}"
    )


def _bytes(values: Any) -> Any:
    return np.bincount(
        np.frombuffer(values.astype("<u4").tobytes(), np.uint8), minlength=256
    )


def _even(counts: Any) -> float:
    """Return the chance of counts as uneven as these."""
    from scipy.stats import chisquare

    return float(chisquare(counts).pvalue)


def context(setup: SealedSetup) -> Finding:
    """Try to open packets as if they were sealed for another slot, or another trustee."""
    setup = setup.planning(2)
    with setup.bench(_SMALL) as bench:
        node = bench.cohort(1)[0]
        content = bench.content(node, np.zeros(_SMALL))
        packets: Any = content.config_records[SEALED][PACKETS]
        slot = bench.slot
        opened = []
        for name, packet in zip(slot.names, packets, strict=True):
            infos = {f: other.info(name) for f, other in _other_slots(slot).items()}
            infos |= {"name": slot.info(name + "'"), "nothing": b""}
            opened += [
                what
                for what, info in infos.items()
                if bench.keys[name].open(packet, info) is not None
            ]
            opened += [
                f"the key of {other}"
                for other in slot.names
                if other != name
                and bench.keys[other].open(packet, slot.info(name)) is not None
            ]
    count = len(infos) + len(slot.names) - 1
    return not opened, (
        f"a packet opens for its own slot and trustee alone, and with none of {count} other "
        "settings, names and keys"
        + (f", but for {', '.join(sorted(set(opened)))}" if opened else "")
    )


def _other_slots(slot: SlotSettings) -> dict[str, SlotSettings]:
    """Return settings that differ in one field each, by its name."""
    changes: dict[str, Any] = {
        "run": slot.run + "0",
        "slot": slot.slot + 1,
        "planned_slots": slot.planned_slots + 1,
        "size": slot.size + 1,
        "num_clients": slot.num_clients + 1,
        "clipping_norm": slot.clipping_norm * 2,
        "noise_multiplier": slot.noise_multiplier / 2,
        "colluding": slot.colluding + 1,
        "trustees": slot.trustees[::-1],
        "adapter": "0" * 64,
    }
    return {f: replace(slot, **{f: value}) for f, value in changes.items()}


def client_refusals(setup: SealedSetup) -> Finding:
    """Ask a client for what its owner does not allow, then for what is allowed, once."""
    setup = setup.planning(3)
    taken = []
    with setup.bench(_SMALL) as bench:
        bench.cohort(1)
        old = bench.message
        node = bench.cohort(2)[0]
        attempts = {**_forged(bench), "the adapter": _other_adapter(bench)}
        for what, forged in attempts.items():
            if not _refuses(bench, node, forged):
                taken.append(what)
        if _refuses(bench, node, bench.message):
            taken.append("REFUSES WHAT IS ALLOWED")
        for what, message in (
            ("the same slot again", bench.message),
            ("a slot before", old),
        ):
            if not _refuses(bench, node, message):
                taken.append(what)
    return not taken, (
        f"a client trains for none of {len(attempts) + 2} slots that promise less, are not "
        "signed by a pinned trustee, or were answered"
        + (f": NO: {', '.join(taken)}" if taken else "")
    )


def _refuses(bench: SealedBench, node: int, message: Message) -> bool:
    """Return whether a client refuses before it computes anything."""
    trained: list[bool] = []

    def train() -> tuple[Mapping[str, Any], Any]:
        trained.append(True)
        return bench.reference, bench.reference

    try:
        bench.parties.answer(node, message, train)
    except FedllmError:
        return not trained
    return False


def _forged(bench: SealedBench) -> dict[str, Message]:
    """Return what a server may send instead of a slot, by what is wrong with it."""
    message = bench.message
    record = message.content.config_records[CONFIG]
    slot = SlotSettings.parse(record[SLOT])
    entries = parse_certificates(record[CERTIFICATES])
    forged: dict[str, tuple[SlotSettings, tuple[Certificate, ...]]] = {
        "less noise": (
            replace(slot, noise_multiplier=slot.noise_multiplier * 0.99),
            entries,
        ),
        "another run": (replace(slot, run="0" * 64), entries),
        "more slots": (replace(slot, planned_slots=slot.planned_slots + 1), entries),
        "a slot that is not the round": (replace(slot, slot=slot.slot + 1), entries),
        "an infinite clip": (replace(slot, clipping_norm=float("inf")), entries),
        "another adapter": (replace(slot, adapter="0" * 64), entries),
        "fewer trustees": (replace(slot, trustees=slot.trustees[1:]), entries[1:]),
        "keys of nobody": _with(slot, entries, signature="00" * 64),
        "a stranger": _with(slot, entries, name="stranger"),
        "the server's own key": _with(
            slot, entries, key="11" * (len(entries[0].key) // 2)
        ),
        "a key that has ended": _in_place(
            slot, entries, bench.parties.signed(replace(entries[0], expires=1))
        ),
        "a key of another run": _in_place(
            slot, entries, bench.parties.signed(replace(entries[0], run="0" * 64))
        ),
        "one trustee twice": _with(
            slot,
            entries,
            **{f: getattr(entries[1], f) for f in ("name", "key", "signature")},
        ),
    }
    if slot.colluding:
        less = replace(slot, colluding=slot.colluding - 1)
        forged["fewer that collude"] = (less, entries)
    return {what: _sent(message, *pair) for what, pair in forged.items()}


def _with(
    slot: SlotSettings, entries: tuple[Certificate, ...], **changes: Any
) -> tuple[SlotSettings, tuple[Certificate, ...]]:
    """Return a slot and certificates, of which the first is changed."""
    return _in_place(slot, entries, replace(entries[0], **changes))


def _in_place(
    slot: SlotSettings, entries: tuple[Certificate, ...], first: Certificate
) -> tuple[SlotSettings, tuple[Certificate, ...]]:
    """Return a slot and certificates with another first one."""
    entries = (first, *entries[1:])
    named = tuple((entry.name, entry.key) for entry in entries)
    return replace(slot, trustees=named), entries


def _sent(
    message: Message, slot: SlotSettings, entries: tuple[Certificate, ...]
) -> Message:
    """Return a message with other settings and certificates."""
    config = ConfigRecord(dict(message.content.config_records[CONFIG]))
    config[SLOT], config[CERTIFICATES] = slot.text, certificates_text(entries)
    content = RecordDict(
        {ARRAYS: message.content.array_records[ARRAYS], CONFIG: config}
    )
    return Message(content, message.metadata.dst_node_id, "train")


def _other_adapter(bench: SealedBench) -> Message:
    """Return a slot's message that brings another adapter than the slot names."""
    other = {name: value + 1 for name, value in bench.reference.items()}
    config = bench.message.content.config_records[CONFIG]
    content = RecordDict({ARRAYS: array_record(other), CONFIG: config})
    return Message(content, bench.message.metadata.dst_node_id, "train")


def failures(setup: SealedSetup) -> Finding:
    """Compare the replies of clients whose training fails with that of one that works."""
    errors: list[Exception] = [ValueError("no rows"), MemoryError(), TimeoutError()]
    with setup.bench(_SMALL) as bench:
        nodes = bench.cohort(1)
        forms, zero = {_form(bench.content(nodes[0], np.ones(_SMALL)))}, True
        for node, error in zip(nodes[1:], errors, strict=False):
            content = bench.parties.answer(node, bench.message, _raising(error))
            forms.add(_form(content))
            zero &= not bench.integers(content).any()
    return len(forms) == 1 and zero, (
        f"{len(errors)} trainings that fail send zero, and "
        f"{'look like any other' if len(forms) == 1 else 'SHOW IT'}"
        + ("" if zero else "; NOT ZERO")
    )


def _raising(error: Exception) -> Callable[[], Any]:
    def train() -> Any:
        raise error

    return train


def _form(content: RecordDict) -> str:
    """Return all of a reply but for what is under pads or sealed, as text."""
    arrays = [
        (key, name, item.dtype, tuple(item.shape), len(item.data))
        for key, record in content.array_records.items()
        for name, item in record.items()
    ]
    records: dict[str, Any] = {**content.config_records, **content.metric_records}
    others = {
        key: {
            name: [len(entry) for entry in value] if name == PACKETS else value
            for name, value in dict(record).items()
        }
        for key, record in records.items()
    }
    return repr((arrays, others))
