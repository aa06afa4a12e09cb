"""The checks of the lowest bits: what leaves is a function of noised integers, to the last bit.

A published float shows more of the noise near zero than elsewhere, and a checkpoint shows all
of it. Neither may rule out a neighbour. So these checks do not look at spreads. They read the
integer of the public grid behind every value, and then make the round of a neighbour, in which
one client is missing, publish the same bits: the sampler has only to take other words.
"""

import contextlib
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from flwr.app import RecordDict

from fedllm.adapters.spec import Arrays
from fedllm.auditing.forced_draws import ForcedDraws
from fedllm.auditing.harness import (
    Bench,
    Finding,
    NotAsPromisedError,
    Setup,
    ZeroNoise,
)
from fedllm.config import RunConfig
from fedllm.privacy.discrete_gaussian import VARIANCE, integer_sensitivity
from fedllm.privacy.mechanism import Integers, Vector
from fedllm.runs.checkpoint import CHECKPOINT_FILE, Checkpoint, State
from fedllm.runs.directory import RunDirectory
from fedllm.strategy.fedavg import AdapterFedAvg
from fedllm.wire.messages import ARRAYS, array_record

_SIZE = 1024
_ROUNDS = 2
# A correct strategy fails the statistical part of a check with at most this probability.
_BY_CHANCE = 1e-9
_PRIMES = (2, 3, 5, 7, 11, 13, 17)
_NEAR_ZERO = range(-16, 17)
_TAILS = (6, 8, 12)
"""In standard deviations. A neighbour's draw may lie further out, and the table ends at 20."""


@dataclass(frozen=True)
class _Forced:
    """One round: what entered and left, and the integers behind it.

    Attributes:
        integers: (d,) what entered, in units of the grid, all clients' sum and noise.
        draws: (d,) the noise in it.
        by_chance: (d,) whether a draw was not chosen by the audit.
    """

    integers: Integers
    draws: Integers
    by_chance: npt.NDArray[np.bool_]


def published_values(setup: Setup) -> Finding:
    """Make a neighbour publish every float32 of a round, those near zero and in tails too."""
    with _zero_bench(setup, setup.config) as bench:
        forced = _release(setup, bench, 1)
        published = _bits(bench.reference)
        if _bits(_replayed(bench).reference) != published:
            return (
                False,
                "the adapter is not what the optimiser makes of the grid's values",
            )
        with _zero_bench(setup, setup.config) as other:
            _release_as(setup, other, 1, forced.integers)
            same = _bits(other.reference) == published
    chance = _residues_chance(forced.draws[forced.by_chance])
    chosen = _SIZE - int(forced.by_chance.sum())
    return same and chance > _BY_CHANCE, (
        f"each of {_SIZE:,} float32 values is a function of an integer on the public grid "
        f"C / {integer_sensitivity(setup.settings.noise_multiplier):,}, and without one "
        f"client the round {'publishes the same bits' if same else 'CANNOT PUBLISH THEM'} "
        f"by other draws, {chosen} of them forced near a published zero and at {_TAILS[0]} "
        f"to {_TAILS[-1]} standard deviations (exact); draws fall evenly on all residues "
        f"(p = {chance:.2g}; below {_BY_CHANCE:g} fails)"
    )


def checkpoint_moments(setup: Setup) -> Finding:
    """Make a neighbour write the same checkpoint, with each optimiser that keeps moments."""
    count, names = 0, set[str]()
    optimizers: tuple[Literal["momentum", "adam", "yogi"], ...]
    optimizers = ("momentum", "adam", "yogi")
    for optimizer in optimizers:
        strategy = replace(setup.config.strategy, server_optimizer=optimizer)
        config = replace(setup.config, strategy=strategy)
        with _zero_bench(setup, config) as bench:
            integers = [
                _release(setup, bench, r).integers for r in bench.rounds(_ROUNDS)
            ]
            written, checkpoint = _checkpoint(bench, len(integers))
            twin = _replayed(bench)
        moments = twin.optimizer.moments
        if _bits(checkpoint.moments) != _bits(moments) or _bits(
            checkpoint.arrays
        ) != _bits(twin.reference):
            return False, (
                f"{optimizer}: the checkpoint holds other values than the optimiser makes "
                "of the grid's"
            )
        with _zero_bench(setup, config) as other:
            for index, wanted in enumerate(integers):
                _release_as(setup, other, index + 1, wanted)
            if _checkpoint(other, len(integers))[0] != written:
                return False, (
                    f"{optimizer}: without one client no draw leads to the same checkpoint"
                )
        count += sum(m.size for m in moments.values())
        names |= moments.keys()
    return True, (
        f"{count:,} values of {', '.join(sorted(names))} in the checkpoints of "
        f"{len(optimizers)} optimisers are functions of integers on the public grid, and "
        "without one client a run writes the same file, byte for byte, by other draws "
        "(exact)"
    )


@contextlib.contextmanager
def _zero_bench(setup: Setup, config: RunConfig) -> Iterator[Bench]:
    """Yield a bench whose adapter begins at zero: there a float32 has the most digits."""
    with setup.bench(_SIZE, config=config) as bench:
        _put(bench, {k: np.zeros_like(v) for k, v in bench.reference.items()})
        yield bench


def _put(bench: Bench, reference: Arrays) -> None:
    bench.strategy.strategy.reference = dict(reference)


def _release(setup: Setup, bench: Bench, server_round: int) -> _Forced:
    """Release a round of all clients, with some draws forced.

    Raises:
        NotAsPromisedError: A value that enters the optimiser is not on the grid.
    """
    whole = _sum(setup, bench, server_round, missing=False)
    deviation = VARIANCE**0.5
    wanted = [n - whole[i] for i, n in enumerate(_NEAR_ZERO)]
    tails = [round(sign * s * deviation) for s in _TAILS for sign in (-1, 1)]
    # The sum at these places comes on top, and may be some deviations by itself.
    draws = np.array([*wanted, *tails], np.int64)
    places = np.flatnonzero(np.abs(draws) <= _TAILS[-1] * deviation + 1)
    bench.strategy.generator = ForcedDraws(places, draws[places])
    bench.release(server_round, _replies(bench, missing=False))
    integers = _integers(bench)
    by_chance = np.ones(_SIZE, np.bool_)
    by_chance[places] = False
    return _Forced(integers, integers - whole, by_chance)


def _release_as(
    setup: Setup, bench: Bench, server_round: int, integers: Integers
) -> None:
    """Release a round of all clients but one, with draws that lead to given integers.

    Raises:
        NotAsPromisedError: No draw does.
    """
    draws = integers - _sum(setup, bench, server_round, missing=True)
    try:
        forced = ForcedDraws(np.arange(_SIZE), draws)
    except ValueError:
        raise NotAsPromisedError(
            "a value is so far out that without one client no draw leads to it: the noise "
            "is too small"
        ) from None
    bench.strategy.generator = forced
    bench.release(server_round, _replies(bench, missing=True))


def _sum(setup: Setup, bench: Bench, server_round: int, missing: bool) -> Integers:
    """Return the sum without noise of a bench's next round, in units of the grid."""
    with setup.bench(_SIZE, config=bench.config) as silent:
        _put(silent, bench.reference)
        silent.strategy.generator = ZeroNoise()
        silent.release(server_round, _replies(silent, missing))
        return _integers(silent)


def _replies(bench: Bench, missing: bool) -> Sequence[tuple[int, RecordDict]]:
    """Return updates of norm 2 C in different directions, the first client's or not."""
    draw = np.random.default_rng(bench.population)
    scale = 2 * bench.settings.clipping_norm / _SIZE**0.5
    return [
        (node, RecordDict({ARRAYS: array_record(bench.update(update))}))
        for node, update in zip(
            bench.population,
            draw.normal(0, scale, (len(bench.population), _SIZE)),
            strict=True,
        )
        if not (missing and node == bench.population[0])
    ]


def _integers(bench: Bench) -> Integers:
    """Return the integers behind what entered the optimiser last.

    Raises:
        NotAsPromisedError: A value is no function of one.
    """
    settings, entered = bench.settings, bench.entered[-1]
    unit = settings.clipping_norm / integer_sensitivity(settings.noise_multiplier)
    nearest = np.rint(entered * settings.num_sampled_clients / unit)
    made = _image(nearest, unit, settings.num_sampled_clients)
    off = int(np.sum(made != entered))
    if off:
        raise NotAsPromisedError(
            f"{off:,} of {len(entered):,} values that enter the optimiser are no function "
            "of an integer on the public grid: their lowest bits may rule out a neighbour"
        )
    return nearest.astype(np.int64)


def _image(integers: Vector, unit: float, num_clients: float) -> Vector:
    """Return what enters the optimiser for some integers, in the mechanism's roundings."""
    return integers * unit / num_clients


def _replayed(bench: Bench) -> AdapterFedAvg:
    """Return a strategy without privacy that got what entered the optimiser, and no more."""
    zero = {k: np.zeros_like(v) for k, v in bench.start.items()}
    twin = AdapterFedAvg(bench.config, zero, bench.population)
    for server_round, entered in enumerate(bench.entered, start=1):
        twin.apply_update(server_round, entered)
    return twin


def _checkpoint(bench: Bench, num_rounds: int) -> tuple[bytes, Checkpoint]:
    """Return the checkpoint of a bench as a run writes it, and as it is read."""
    releases = list(range(1, num_rounds + 1))
    state = State(
        run="audit",
        run_id=1,
        server_round=num_rounds,
        releases=releases,
        population=bench.population,
        trained=True,
        failures={},
        best_round=None,
        best_loss=None,
        base="",
        adapter={},
    )
    with tempfile.TemporaryDirectory(prefix="fedllm-audit-") as name:
        folder = Path(name)
        moments = dict(bench.moments)
        Checkpoint(state, bench.reference, {}, moments).write(RunDirectory(folder))
        return (folder / CHECKPOINT_FILE).read_bytes(), Checkpoint.read(folder)


def _bits(arrays: Mapping[str, npt.NDArray[Any]]) -> dict[str, bytes]:
    """Return arrays as bytes: 0.0 and -0.0 are two values."""
    return {name: np.ascontiguousarray(v).tobytes() for name, v in arrays.items()}


def _residues_chance(draws: Integers) -> float:
    """Return the chance of residues as uneven as those of draws, modulo small primes.

    Noise on a coarser grid than the sum's would tell neighbours apart by a residue.
    """
    from scipy.stats import chisquare

    chances = [
        float(chisquare(np.bincount(draws % prime, minlength=prime)).pvalue)
        for prime in _PRIMES
    ]
    return min(1.0, min(chances) * len(chances))
