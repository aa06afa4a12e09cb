"""The checks of a sealed run's trustees: their noise, in exact integers, and what they refuse."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from flwr.app import Message

from fedllm.auditing.forced_draws import ForcedDrawsOfTwo
from fedllm.auditing.harness import Finding, norm_of
from fedllm.auditing.sealed_bench import SealedBench, SealedSetup
from fedllm.auditing.statistical_checks import seeded
from fedllm.errors import FedllmError
from fedllm.privacy.agreement import SlotSettings
from fedllm.privacy.discrete_gaussian import variance_of_two
from fedllm.privacy.lower_bounds import plausible_spread
from fedllm.privacy.mechanism import Integers, SecureGenerator
from fedllm.privacy.pads import fresh_seed, seal
from fedllm.privacy.sealed_sum import SealedGrid
from fedllm.wire.masking import masked
from fedllm.wire.messages import CONFIG
from fedllm.wire.sealed_messages import (
    PACKETS,
    SEALED,
    SLOT,
    read_residues,
    read_unopened,
)

# A correct trustee fails a statistical check with about this probability.
_BY_CHANCE = 1e-9
_SIGMAS = 6.0
_SMALL = 64
_ROUNDS = 2
_PARTS = 8
_PRIMES = (2, 3, 5, 7, 11, 13, 17)
_BORDERS = np.arange(-3.5, 3.75, 0.25)
"""Between cells of a draw's distribution, in standard deviations."""
_TAILS = (6, 8, 12)
"""In standard deviations: too far out to wait for them."""


def trustees_noise(setup: SealedSetup) -> Finding:
    """Measure each trustee's noise: its scale on every part, its shape, its residues."""
    setup = setup.planning(_ROUNDS)
    drawn: dict[str, list[Integers]] = {}
    squares = 0.0
    with setup.bench(setup.dimension, 2) as bench:
        for server_round in range(1, _ROUNDS + 1):
            bench.release(server_round, [])
            for name in bench.slot.names:
                drawn.setdefault(name, []).append(bench.noise_of(name))
        grid = bench.grid
        opened = np.concatenate(bench.entered) * bench.settings.num_sampled_clients
        squares = float(np.sum(np.square(opened)))
    wrong = [
        f"{name}: {what}"
        for name, values in drawn.items()
        for what in _oddities(np.stack(values), grid, len(drawn))
    ]
    if not plausible_spread(squares, len(opened), setup.promised_noise, _BY_CHANCE):
        wrong.append("the opened sum: scale")
    if not _draws_tails(grid):
        wrong.append("the sampler: tails")
    ratio = (squares / len(opened)) ** 0.5 / setup.promised_noise
    sizes = " ".join(
        f"{np.std(np.stack(values)) / variance_of_two(grid.spread) ** 0.5:.4f}"
        for values in drawn.values()
    )
    return not wrong, (
        f"each trustee's noise over what its share has to be: {sizes}; the opened sum's over "
        f"z C sqrt(k / (k - c)): {ratio:.4f}; on {_PARTS} parts, in {len(_BORDERS) + 1} cells "
        f"and by residues as drawn from the discrete Gaussian, to {_TAILS[-1]} deviations"
        + (f": NO: {', '.join(wrong)}" if wrong else "")
    )


def _oddities(
    values: npt.NDArray[np.int64], grid: SealedGrid, trustees: int
) -> list[str]:
    """Return what D(s) cannot be like in one trustee's draws, (rounds, d)."""
    from scipy.stats import chisquare, norm

    chance = _BY_CHANCE / trustees
    deviation = variance_of_two(grid.spread) ** 0.5
    wrong = []
    for part in np.array_split(values, _PARTS, axis=1):
        squares = float(np.sum(np.square(part.astype(np.float64))))
        if not plausible_spread(squares, part.size, deviation, chance / _PARTS):
            wrong.append("scale")
            break
    shares = np.diff(norm.cdf([-np.inf, *_BORDERS, np.inf]))
    cells = np.bincount(
        np.searchsorted(_BORDERS, values.ravel() / deviation), minlength=len(shares)
    )
    if chisquare(cells, shares * values.size).pvalue < chance:
        wrong.append("shape")
    for prime in _PRIMES:
        counts = np.bincount(values.ravel() % prime, minlength=prime)
        if chisquare(counts).pvalue < chance / len(_PRIMES):
            wrong.append(f"residues of {prime}")
            break
    return wrong


def _draws_tails(grid: SealedGrid) -> bool:
    """Return whether the sampler draws what lies far out, if its words say so."""
    deviation = variance_of_two(grid.spread) ** 0.5
    wanted = np.array([round(s * t * deviation) for t in _TAILS for s in (-1, 1)])
    drawn = grid.noise(len(wanted), ForcedDrawsOfTwo(wanted, grid.spread))
    return bool(np.array_equal(drawn, wanted))


def fresh_noise(setup: SealedSetup) -> Finding:
    """Compare all trustees' noise in two federations and two slots with all seeds equal."""
    setup = setup.planning(2)
    noise: list[Integers] = []
    for _ in range(2):
        with setup.bench(setup.dimension, 2) as bench:
            for server_round in (1, 2):
                with seeded():
                    bench.release(server_round, [])
                noise += [bench.noise_of(name) for name in bench.slot.names]
    units = np.stack([(v / max(norm_of(v.astype(float)), 1.0)) for v in noise])
    products = np.abs(units @ units.T)
    largest = float(
        max(products[a, b] for a, b in itertools.combinations(range(len(noise)), 2))
    )
    limit = _SIGMAS / setup.dimension**0.5
    return largest < limit, (
        f"with all seeds set alike no two of {len(noise)} vectors of noise, of each trustee in "
        f"two slots of two federations, resemble each other: largest correlation "
        f"{largest:.4f} (chance stays below {limit:.4f})"
    )


@dataclass(frozen=True)
class _Lists:
    """The packets of two slots to one trustee."""

    first: Sequence[bytes]
    second: Sequence[bytes]


def slots(setup: SealedSetup) -> Finding:
    """Ask a trustee for what would open a pad twice, alone, or for less noise."""
    setup = setup.planning(3)
    opened: list[str] = []
    with setup.bench(_SMALL, 4) as bench:
        name = bench.config.trustees[0]
        nodes = bench.cohort(1)
        zero = np.zeros(_SMALL)
        first = _packets_to_first(bench, nodes, zero)
        old = bench.tally_message(name, first)
        nodes = bench.cohort(2)
        second = _packets_to_first(bench, nodes, zero)
        tries = _refused(bench, name, _Lists(first, second))
        for what, message in tries.items():
            if _vector(bench, message) is not None:
                opened.append(what)
        spent = bench.parties.last_slot(name)
        if spent:
            opened.append(f"A REFUSAL SPENDS SLOT {spent}")
        if not _names_spoiled(bench, name, second):
            opened.append("a packet that does not open is not named")
        if not _is_spent_first(bench, name, second):
            opened.append("the slot is on disk after the noise is drawn")
        after = {
            "the same slot again": bench.tally_message(name, second),
            "the same slot, a smaller list": bench.tally_message(name, second[:1]),
            "a slot before": old,
        }
        for what, message in after.items():
            if _vector(bench, message) is not None:
                opened.append(what)
    return not opened, (
        f"a trustee opens a slot once, after it is on its disk, and for none of "
        f"{len(tries) + len(after)} lists and settings that would take noise off"
        + (f": NO: {', '.join(opened)}" if opened else "")
    )


def _packets_to_first(
    bench: SealedBench, nodes: Sequence[int], update: npt.NDArray[np.float64]
) -> list[bytes]:
    packets: list[bytes] = []
    for node in nodes:
        entries: Any = bench.content(node, update).config_records[SEALED][PACKETS]
        packets.append(entries[0])
    return packets


def _refused(bench: SealedBench, name: str, lists: _Lists) -> dict[str, Message]:
    """Return what no trustee may open, by what is wrong with it."""
    slot, second = bench.slot, list(lists.second)
    key = bytes.fromhex(dict(slot.trustees)[name])
    seed, info = fresh_seed(), slot.info(name)
    twins = [seal(seed, key, info) for _ in range(2)]
    spoiled = second[0][:-1] + bytes([second[0][-1] ^ 1])
    lists_of = {
        "a packet twice": [*second[:1], *second[:1]],
        "a seed twice": twins,
        "no packet": [],
        "more packets than clients": second
        + [seal(fresh_seed(), key, info) for _ in range(slot.num_clients)],
        "a packet of another slot": [*second[1:], lists.first[0]],
        "a packet that does not open": [*second[1:], spoiled],
    }
    messages = {what: bench.tally_message(name, p) for what, p in lists_of.items()}
    return messages | {
        what: _asking(bench, name, second, settings)
        for what, settings in _worse(slot).items()
    }


def _worse(slot: SlotSettings) -> dict[str, SlotSettings]:
    others = {
        "less noise": replace(slot, noise_multiplier=slot.noise_multiplier * 0.99),
        "another run": replace(slot, run="0" * 64),
        "more slots": replace(slot, planned_slots=slot.planned_slots + 1),
        "fewer trustees": replace(slot, trustees=slot.trustees[:-1]),
        "another key": replace(
            slot, trustees=((slot.names[0], slot.trustees[1][1]), *slot.trustees[1:])
        ),
    }
    if slot.colluding:
        others["fewer that collude"] = replace(slot, colluding=slot.colluding - 1)
    return others


def _asking(
    bench: SealedBench, name: str, packets: Sequence[bytes], slot: SlotSettings
) -> Message:
    """Return what asks a trustee under other settings, with packets sealed for these."""
    key = bytes.fromhex(dict(bench.slot.trustees)[name])
    fitting = [seal(fresh_seed(), key, slot.info(name)) for _ in packets]
    message = bench.tally_message(name, fitting)
    message.content.config_records[CONFIG][SLOT] = slot.text
    return message


def _vector(bench: SealedBench, message: Message) -> Any:
    """Return the vector that a trustee opens, or None."""
    node = message.metadata.dst_node_id
    try:
        content = bench.parties.answer(node, message)
    except FedllmError:
        return None
    reply = Message(masked(content), reply_to=message)
    return read_residues(reply, bench.settings.num_trainable)[1]


def _names_spoiled(bench: SealedBench, name: str, packets: Sequence[bytes]) -> bool:
    """Return whether a trustee names the packet that does not open, and it alone."""
    spoiled = packets[1][:-1] + bytes([packets[1][-1] ^ 1])
    message = bench.tally_message(name, [packets[0], spoiled])
    content = bench.parties.answer(message.metadata.dst_node_id, message)
    return read_unopened(Message(masked(content), reply_to=message), 2) == (1,)


def _is_spent_first(bench: SealedBench, name: str, packets: Sequence[bytes]) -> bool:
    """Have a trustee open its slot; return whether that was on its disk before the noise."""
    seen: list[int] = []
    real = bench.slot

    class Grid(SealedGrid):
        def noise(self, size: int, generator: SecureGenerator) -> Integers:
            seen.append(bench.parties.last_slot(name))
            return super().noise(size, generator)

    class Settings(SlotSettings):
        @property
        def grid(self) -> SealedGrid:
            return Grid(real.grid.spread, real.grid.sensitivity)

    values = {field: getattr(real, field) for field in real.__dataclass_fields__}
    result = bench.parties.trustee(name).tally(Settings(**values), packets)
    return result.vector is not None and seen == [real.slot]
