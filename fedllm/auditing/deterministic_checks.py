"""The checks without chance: the sum, its divisor, its ledger."""

import itertools
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from flwr.app import RecordDict

from fedllm.auditing.harness import (
    NUM_CLIENTS,
    Finding,
    Setup,
    honest_reply,
    norm_of,
)
from fedllm.auditing.hostile_replies import Content, hostile_replies, packed_replies
from fedllm.config import Encoding, WireConfig
from fedllm.privacy.ledger import PrivacySettings
from fedllm.privacy.mechanism import Vector
from fedllm.privacy.wording import rounds_text

_MOST_COUNTED = 100
# Sums of a few C in float64, and the division by n.
_ROUNDING = 1e-9
_SMALL = 64
# The kind of hostile reply that is clipped to C along the direction of all others.
_COUNTS_WHOLE = "far along the others"


def sensitivity(setup: Setup) -> Finding:
    """Add each hostile reply to honest ones that all point the same way."""
    with setup.bench(_SMALL, silent=True) as bench:
        reference = bench.start
    plain = hostile_replies(reference, setup.settings.clipping_norm)
    moves = [_moved_by(setup, "float32", plain)]
    encodings: tuple[Encoding, ...] = ("float16", "int8")
    for encoding in encodings:
        packed = packed_replies(reference, encoding)
        moves.append(_moved_by(setup, encoding, packed))
    (one, worst), two = max(one for one, _ in moves), max(two for _, two in moves)
    count = len(plain) + sum(len(packed_replies(reference, e)) for e in encodings)
    passed = one <= 1 + _ROUNDING and two <= 2 + _ROUNDING
    return passed, (
        f"of {count} kinds of hostile reply none may move the sum by more than "
        f"1 C, nor by 2 C when it replaces another: {one:.9f} C "
        f"({worst!r}) and {two:.9f} C"
    )


def _moved_by(
    setup: Setup, encoding: Encoding, kinds: Mapping[str, Content]
) -> tuple[tuple[float, str], float]:
    """Return the largest move of the sum by a reply, its kind, and the largest by a swap.

    Both in units of C.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # NumPy warns of hostile headers.
        sums = {k: _sum_with(setup, [c], encoding) for k, c in kinds.items()}
        for kind in kinds.keys() & {_COUNTS_WHOLE}:
            replies = [kinds[kind]] * 2
            sums[f"{kind}, sent twice"] = _sum_with(setup, replies, encoding)
    without, clip = _sum_with(setup, [], encoding), setup.settings.clipping_norm
    worst = max((norm_of(v - without) / clip, kind) for kind, v in sums.items())
    pairs = itertools.combinations(sums.values(), 2)
    return worst, max(norm_of(a - b) / clip for a, b in pairs)


def weights(setup: Setup) -> Finding:
    """Compare the sums of a client that claims more and more examples."""
    claims = (None, 1, 1_000_000)
    sums = []
    for claim in claims:
        with setup.bench(_SMALL, silent=True) as bench:
            nodes = bench.population
            replies = [(n, honest_reply(bench, -0.5, 1)) for n in nodes[1:]]
            replies.append((nodes[0], honest_reply(bench, 0.5, claim)))
            sums.append(bench.release(1, replies))
    moved = max(norm_of(s - sums[0]) for s in sums) / setup.settings.clipping_norm
    return moved <= _ROUNDING, (
        "a client that claims 1,000,000 examples counts as one that claims 1 or "
        f"none: the sum moves by {moved:.3g} C"
    )


def denominator(setup: Setup) -> Finding:
    """Compare the sums with all clients, with silent ones and with failed ones."""
    sums, expected = [], 0.5 * (NUM_CLIENTS // 2)
    for others in ("zero", "silent", "failed"):
        with setup.bench(_SMALL, silent=True) as bench:
            half = len(bench.population) // 2
            replies = [(n, honest_reply(bench, 0.5)) for n in bench.population]
            if others != "silent":
                zero = others == "zero"
                content = honest_reply(bench, 0.0) if zero else RecordDict()
                replies[half:] = [(n, content) for n, _ in replies[half:]]
            else:
                del replies[half:]
            sums.append(bench.release(1, replies))
    clip = setup.settings.clipping_norm
    # In float32 the replies are rounded, so the size is known to about 1e-6.
    off = max(abs(norm_of(e) / clip - expected) / expected for e in sums)
    moved = max(norm_of(e - sums[0]) for e in sums) / clip
    return moved <= _ROUNDING and off < 1e-4, (
        "half of the clients silent or failed moves the adapter as if they sent "
        f"zero: the sum over n differs by {moved:.3g} C, and from what was sent "
        f"by {off:.2g} of it"
    )


def ledger(setup: Setup) -> Finding:
    """Compare the ledger with the rounds and with dp-accounting's epsilon."""
    with setup.bench(_SMALL) as bench:
        planned = min(setup.settings.planned_rounds, _MOST_COUNTED)
        done = []
        for server_round in bench.rounds(planned):
            bench.release(server_round, [])
            done.append(server_round)
        content = bench.ledger_on_disk
        counted = content["releases"] == done and content["num_rounds"] == len(done)
        before = bench.rounds_on_disk == done
    theirs = recomputed_epsilon(setup.settings, content)
    agree = abs(content["epsilon"] - theirs) <= 1e-3 * theirs + 1e-6
    return counted and before and agree, (
        f"{rounds_text(len(done))} released, {content['num_rounds']} in the ledger, each "
        f"on disk before the adapter moved{'' if before else ': NO'}; epsilon "
        f"{content['epsilon']:.4f}, by dp-accounting alone {theirs:.4f}"
    )


def recomputed_epsilon(settings: PrivacySettings, content: Mapping[str, Any]) -> float:
    """Return the zero-out epsilon of the rounds released, by dp-accounting alone.

    Args:
        settings: Noise multiplier, delta and sampling.
        content: A ledger's: rounds, sampling probability, and the accountant, which counts
            if amplification is claimed.
    """
    import dp_accounting as dp
    from dp_accounting import pld, rdp

    count, q = content["num_rounds"], content["sampling_probability"]
    if count == 0:
        return 0.0
    z, delta = settings.noise_multiplier, settings.delta
    unsampled = float(dp.get_epsilon_gaussian(z / count**0.5, delta))
    if settings.sampling != "poisson" or q >= 1:
        return unsampled
    relation = dp.NeighboringRelation.REPLACE_SPECIAL
    # PLD does not return at tiny noise.
    by_rdp = content["accountant"].startswith("RDP")
    kind = rdp.RdpAccountant if by_rdp else pld.PLDAccountant
    accountant = kind(neighboring_relation=relation)
    event = dp.PoissonSampledDpEvent(q, dp.GaussianDpEvent(z))
    accountant.compose(dp.SelfComposedDpEvent(event, count))
    return min(unsampled, float(accountant.get_epsilon(delta)))


def _sum_with(setup: Setup, sent: Sequence[Content], encoding: Encoding) -> Vector:
    """Return the noiseless sum of honest replies and the replies of one more client."""
    config = replace(setup.config, wire=WireConfig(encoding=encoding))
    with setup.bench(_SMALL, silent=True, config=config) as bench:
        first, *others = bench.population
        replies = [(node, honest_reply(bench, 2.0)) for node in others]
        return bench.release(1, [*replies, *((first, content) for content in sent)])
