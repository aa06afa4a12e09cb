"""The audit of a sealed run passes what is built, and its canaries see whose noise is missing."""

import numpy as np
import pytest

from fedllm.privacy.sealed_sum import SealedGrid
from tests.helpers.audits import failed, quick, sealed, sealed_auditor

__all__ = ["quick"]
pytestmark = pytest.mark.usefixtures("quick")


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"strategy.sampling": "fixed", "strategy.fraction-train": 0.5}
        | {"num-server-rounds": 1},
        {"privacy.trustees": "a,b", "privacy.colluding-trustees": 0}
        | {"num-server-rounds": 1, "strategy.server-optimizer": "adam"},
    ],
    ids=["three rounds of all", "a round of half", "two who do not collude"],
)
def test_what_is_built_passes(keys):
    audit = sealed_auditor(sealed(**keys)).run()

    assert failed(audit) == set()
    assert audit.passed
    assert 0 <= audit.rehearsal.certified.epsilon <= audit.rehearsal.accounted


def test_canaries_see_that_the_honest_trustees_add_no_noise(monkeypatch):
    real, count = SealedGrid.noise, []

    def noise(self, size, generator):
        count.append(1)
        # The first of three may be the server's; of the others nothing is left.
        own = real(self, size, generator)
        return own if len(count) % 3 == 1 else np.zeros_like(own)

    monkeypatch.setattr(SealedGrid, "noise", noise)
    monkeypatch.setattr("fedllm.strategy.sealed_dp.is_plausible", lambda *_: True)

    assert not sealed_auditor().check("canaries, one release").passed


def test_the_server_is_taken_to_know_the_noise_of_those_that_collude():
    # With all three trustees' noise the canaries would be a fifth harder to see.
    auditor = sealed_auditor(sealed(**{"num-server-rounds": 1}), dimension=20_000)
    with auditor._sealed.bench(20_000, 8) as bench:
        bench.cohort(1)
        seen = bench.release(1, [])
        opened = bench.entered[-1] * bench.settings.num_sampled_clients

    promised = bench.settings.noise_multiplier * bench.settings.clipping_norm
    assert np.std(seen) / promised == pytest.approx(1, abs=0.03)
    assert np.std(opened) / promised == pytest.approx(1.5**0.5, abs=0.03)
