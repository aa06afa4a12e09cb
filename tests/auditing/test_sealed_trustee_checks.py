"""Trustees that are broken in one way each are convicted by their noise and their ledger."""

import numpy as np
import pytest

from fedllm.client import sealing, trustee
from fedllm.client.trustee import Tally, Trustee
from fedllm.errors import FedllmError
from fedllm.privacy import discrete_gaussian
from fedllm.privacy.discrete_gaussian import BASE, Table, variance_of_two
from fedllm.privacy.pads import SealingKey, residues
from fedllm.privacy.sealed_sum import SealedGrid
from tests.helpers.audits import quick, sealed, sealed_auditor

__all__ = ["quick"]
pytestmark = pytest.mark.usefixtures("quick")

NOISE = SealedGrid.noise


def noise(change):
    """Noise that is changed: of a grid, the draws and the generator."""

    def broken(patch):
        patch.setattr(
            SealedGrid,
            "noise",
            lambda self, size, generator: change(
                self, NOISE(self, size, generator), generator
            ),
        )

    return broken


def on_half_the_values(grid, drawn, _):
    drawn[len(drawn) // 2 :] = 0
    return drawn


def cut_at_three_deviations(grid, drawn, _):
    reach = int(3 * variance_of_two(grid.spread) ** 0.5)
    return np.clip(drawn, -reach, reach)


def uniform(grid, drawn, _):
    reach = int((3 * variance_of_two(grid.spread)) ** 0.5)
    generator = np.random.default_rng()
    return generator.integers(-reach, reach + 1, len(drawn))


def of_a_fixed_seed(grid, drawn, _):
    generator = np.random.default_rng(1)
    deviation = variance_of_two(grid.spread) ** 0.5
    return np.rint(generator.normal(0, deviation, len(drawn))).astype(np.int64)


def of_the_global_generator(grid, drawn, _):
    deviation = variance_of_two(grid.spread) ** 0.5
    values = np.random.normal(0, deviation, len(drawn))  # noqa: NPY002
    return np.rint(values).astype(np.int64)


def one_trustee(change):
    """One trustee of the three whose vector is changed."""

    def broken(patch):
        real = Trustee._sum

        def total(self, settings, seeds):
            vector = real(self, settings, seeds)
            return change(settings, seeds, vector) if self.name == "b" else vector

        patch.setattr(Trustee, "_sum", total)

    return broken


def without_noise(settings, seeds, _):
    total = np.zeros(settings.size, np.uint32)
    for seed in seeds:
        trustee.add_pad(total, seed)
    return total


def the_same_noise_twice(settings, seeds, vector):
    return vector - (without_noise(settings, seeds, vector) - vector)


def a_pad_twice(settings, seeds, vector):
    total = vector.copy()
    trustee.add_pad(total, seeds[0])
    return total


def shared_by_trustees(patch):
    drawn = {}

    def shared(self, settings, seeds):
        if settings.context not in drawn:
            drawn[settings.context] = NOISE(
                settings.grid, settings.size, self._generator
            )
        total = without_noise(settings, seeds, None)
        return total - residues(drawn[settings.context])

    patch.setattr(Trustee, "_sum", shared)


def kept_for_later_slots(patch):
    drawn = {}

    def kept(self, settings, seeds):
        own = drawn.setdefault(
            (self.name, settings.run, tuple(settings.trustees)),
            NOISE(settings.grid, settings.size, self._generator),
        )
        return without_noise(settings, seeds, None) - residues(own)

    patch.setattr(Trustee, "_sum", kept)


def a_table_that_ends_early(patch):
    short = Table(BASE, tail=5)
    patch.setattr(discrete_gaussian, "_table", lambda: short)


def answering(
    spends=True, refuses=lambda slot, last: slot <= last, first=True, opens=None
):
    """A trustee's order of things, written anew; each argument breaks one of them."""

    def broken(patch):
        def tally(self, settings, packets):
            trustee._require_list(settings, packets)
            with self._folder.locked() as content:
                runs = dict(content["runs"])
                entry = runs.get(settings.run, {"key": "", "slot": 0})
                if not entry["key"]:
                    raise FedllmError("no key")
                if refuses(settings.slot, entry["slot"]):
                    raise FedllmError("spent")
                key = SealingKey(bytes.fromhex(entry["key"]))
                if (self.name, key.public.hex()) not in settings.trustees:
                    raise FedllmError("another key")
                info = settings.info(self.name)
                seeds = [key.open(packet, info) for packet in packets]
                known = [seed for seed in seeds if seed is not None]
                if opens is None:
                    if len(set(known)) != len(known):
                        raise FedllmError("twice")
                    if len(known) != len(seeds):
                        places = [i for i, s in enumerate(seeds) if s is None]
                        return Tally(None, tuple(places))
                else:
                    known = opens(known)
                spent = {**entry, "slot": settings.slot}
                vector = None if first else self._sum(settings, known)
                if spends:
                    self._folder.write(
                        {**content, "runs": {**runs, settings.run: spent}}
                    )
            return Tally(self._sum(settings, known) if vector is None else vector)

        patch.setattr(Trustee, "tally", tally)

    return broken


def no_check(target, name):
    return lambda patch: patch.setattr(target, name, lambda *_: None)


BROKEN = [
    ("trustees' noise", "no noise of one trustee", one_trustee(without_noise)),
    ("trustees' noise", "half the noise", noise(lambda g, d, _: d // 2)),
    ("trustees' noise", "too much noise", noise(lambda g, d, _: d * 5 // 4)),
    ("trustees' noise", "the same noise twice", one_trustee(the_same_noise_twice)),
    (
        "trustees' noise",
        "the same draws, twice as far apart",
        noise(lambda g, d, _: d & ~1),
    ),
    ("trustees' noise", "noise on half the values", noise(on_half_the_values)),
    (
        "trustees' noise",
        "a sampler cut at 3 deviations",
        noise(cut_at_three_deviations),
    ),
    ("trustees' noise", "a sampler cut at 5 deviations", a_table_that_ends_early),
    ("trustees' noise", "uniform noise", noise(uniform)),
    ("trustees' noise", "a pad that counts twice", one_trustee(a_pad_twice)),
    ("fresh noise", "noise of a fixed seed", noise(of_a_fixed_seed)),
    ("fresh noise", "noise of the global generator", noise(of_the_global_generator)),
    ("fresh noise", "one noise for all trustees", shared_by_trustees),
    ("fresh noise", "one noise for all slots", kept_for_later_slots),
    (
        "slots",
        "a slot is opened again",
        answering(refuses=lambda slot, last: slot < last),
    ),
    (
        "slots",
        "the counter goes back",
        answering(refuses=lambda slot, last: slot == last),
    ),
    ("slots", "no slot is kept", answering(spends=False)),
    ("slots", "the ledger comes after the noise", answering(first=False)),
    ("slots", "packets twice, and whatever opens", answering(opens=list)),
    (
        "slots",
        "a seed twice counts once",
        answering(opens=lambda k: list(dict.fromkeys(k))),
    ),
    ("slots", "any list", no_check(trustee, "_require_list")),
    ("slots", "settings are not checked", no_check(sealing, "require_promised")),
]


@pytest.mark.parametrize(
    ("check", "broken"), [b[::2] for b in BROKEN], ids=[b[1] for b in BROKEN]
)
def test_a_broken_trustee_is_convicted(check, broken, monkeypatch):
    broken(monkeypatch)

    assert not sealed_auditor().check(check).passed


@pytest.mark.parametrize("check", sorted({b[0] for b in BROKEN}))
@pytest.mark.parametrize("hybrid", [False, True])
def test_todays_trustees_are_acquitted(check, hybrid):
    result = sealed_auditor(sealed(**{"privacy.post-quantum": hybrid})).check(check)

    assert result.passed, result.text


def test_a_trustees_order_written_anew_is_acquitted(monkeypatch):
    answering()(monkeypatch)

    result = sealed_auditor().check("slots")

    assert result.passed, result.text
