"""The checks of a sealed run's server: what it opens is the noised sum, and nothing else counts."""

from typing import Any

import numpy as np
from flwr.app import RecordDict

from fedllm.auditing.deterministic_checks import ledger
from fedllm.auditing.harness import Contents, Finding, NotAsPromisedError
from fedllm.auditing.sealed_bench import SealedBench, SealedSetup, residues_of
from fedllm.wire.messages import ARRAYS, array_record, error_content
from fedllm.wire.sealed_messages import SEALED, sealed_content

_SIZE = 1024


def opened_sum(setup: SealedSetup) -> Finding:
    """Compare what enters the optimiser with the integers that the parties added, exactly."""
    off, lost = 0, ""
    for others in ("all", "silent", "hostile"):
        with setup.bench(_SIZE) as bench:
            nodes = bench.cohort(1)
            draw, clip = np.random.default_rng(7), setup.settings.clipping_norm
            replies = []
            total = np.zeros(_SIZE, np.int64)
            count = max(1, len(nodes) // 2) if others != "all" else len(nodes)
            for node in nodes[:count]:
                content = bench.content(node, draw.normal(0, clip / 20, _SIZE))
                total += bench.integers(content)
                replies.append((node, content))
            if others == "hostile":
                replies += _hostile(bench, nodes[count:], replies[0][1])
            bench.release(1, replies)
            total += sum(bench.noise_of(name) for name in bench.slot.names)
            unit = clip / bench.grid.sensitivity
            n = bench.settings.num_sampled_clients
            made = bench.in_adapters_order(total) * unit / n
            differing = int(np.sum(made != bench.entered[-1]))
            off += differing
            lost = lost or (others if differing else "")
    return not off, (
        f"with all clients, with half of them silent, and with hostile ones, each of {_SIZE:,} "
        "values that enter the optimiser is the sum of the clients' integers and of the "
        "trustees' noise over the same n, to the last bit"
        + (f": NOT SO for {off:,} values ({lost})" if off else "")
    )


def _hostile(
    bench: SealedBench, nodes: list[int], honest: RecordDict
) -> list[tuple[int, RecordDict]]:
    """Return replies that must count as nothing."""
    size = bench.settings.num_trainable
    packets: Any = honest.config_records[SEALED]["packets"]
    values = residues_of(honest)
    kinds = [
        # One that repeats what another sent would have its update counted twice.
        sealed_content(values, packets),
        sealed_content(values[:-1], [bytes(len(p)) for p in packets]),
        sealed_content(values, packets[:-1]),
        RecordDict({ARRAYS: array_record(bench.update(np.ones(size)))}),
        error_content("failed", None),
    ]
    return list(zip(nodes, kinds, strict=False))


def length_guard(setup: SealedSetup) -> Finding:
    """Send what is far longer than C: no release may come of it, and the slot is spent."""
    with setup.bench(_SIZE) as bench:
        nodes = bench.cohort(1)
        contents = [(node, bench.content(node, np.zeros(_SIZE))) for node in nodes]
        node, honest = contents[0]
        far = residues_of(honest) + np.uint32(2**30 // int(_SIZE**0.5))
        packets: Any = honest.config_records[SEALED]["packets"]
        contents[0] = (node, sealed_content(far, packets))
        moved = _is_released(bench, contents)
        spent = bench.ledger_on_disk["releases"] == [1]
    return spent and not moved, (
        f"a sum that no clipped updates can have is {'RELEASED' if moved else 'not released'}, "
        f"and its slot is {'spent' if spent else 'NOT SPENT'}"
    )


def _is_released(bench: SealedBench, contents: Contents) -> bool:
    try:
        bench.release(1, contents)
    except NotAsPromisedError:
        return bool(bench.entered)
    return True


def sealed_ledger(setup: SealedSetup) -> Finding:
    """Compare the ledger with the slots that were asked for, and both epsilons with others'."""
    import dp_accounting as dp

    passed, text = ledger(setup)
    with setup.bench(64) as bench:
        bench.release(1, [])
        before = bench.rounds_when_asked == [1]
        content = bench.ledger_on_disk
    settings = setup.settings
    k, c = settings.trustees, settings.colluding
    z = settings.noise_multiplier * (k / (k - c)) ** 0.5
    theirs = float(dp.get_epsilon_gaussian(z, settings.delta))
    agree = abs(content["epsilon_adapters"] - theirs) <= 1e-3 * theirs + 1e-6
    named = (content["trustees"], content["colluding"]) == (k, c)
    return passed and before and agree and named, (
        f"{text}; of one round, against whoever sees the adapters, "
        f"{content['epsilon_adapters']:.4f}, by dp-accounting alone {theirs:.4f}; a slot is on "
        f"disk before a client is asked{'' if before else ': NO'}"
    )
