"""The checks of the lowest bits convict the noise of before, and pass today's."""

import math
from dataclasses import dataclass

import numpy as np
import pytest
from scipy.special import ndtr

from fedllm.auditing import grid_checks
from fedllm.auditing.grid_checks import checkpoint_moments, published_values
from fedllm.auditing.harness import NotAsPromisedError, Setup
from fedllm.planning.noise import privacy_settings
from fedllm.privacy.discrete_gaussian import VARIANCE
from fedllm.privacy.mechanism import FixedPointSum
from fedllm.runs.checkpoint import Checkpoint
from fedllm.strategy.client_level_dp import ClientLevelDP
from fedllm.strategy.fedavg import AdapterFedAvg
from tests.helpers.audits import CLIENTS, DIMENSION, auditor, failed, private
from tests.helpers.continuous_noise import ContinuousNoise, explained, normal

CHECKS = [published_values, checkpoint_moments]
both = pytest.mark.parametrize("check", CHECKS)


def setup_of(kind=ClientLevelDP, **keys):
    def make(config, reference, population, ledger):
        return kind(AdapterFedAvg(config, reference, population), ledger)

    config = private(**keys)
    return Setup(config, privacy_settings(config, CLIENTS, DIMENSION), DIMENSION, make)


@both
@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"strategy.server-optimizer": "yogi", "strategy.sampling": "poisson"}
        | {"strategy.fraction-train": 0.5}
        | {"privacy.target-epsilon": 0.0, "privacy.noise-multiplier": 3.0},
        {"privacy.target-epsilon": 0.0, "privacy.noise-multiplier": 0.02},
        {"privacy.clipping-norm": 1e-3, "num-server-rounds": 1},
    ],
    ids=["default", "poisson", "little noise", "one round"],
)
def test_todays_noise_passes(check, keys):
    passed, text = check(setup_of(**keys))

    assert passed, text
    assert "(exact)" in text


def test_the_noise_of_before_is_convicted_by_the_audit():
    def make(config, reference, population, ledger):
        return ContinuousNoise(AdapterFedAvg(config, reference, population), ledger)

    audit = auditor(make=make).run()

    assert failed(audit) == {"published values", "checkpoint moments"}
    texts = {check.name: check.text for check in audit.checks}
    assert "no function of an integer on the public grid" in texts["published values"]


@dataclass
class Value:
    published: float
    release: float


PUBLISH = {
    # The adapter begins at zero; n = 20, the server's learning rate is 0.6.
    "adapter": lambda release: (0.6 * (release / 20)).astype(np.float32),
    "first moment": lambda release: release / 20,
}


@pytest.mark.parametrize(("what", "where"), [("adapter", 0.0), ("first moment", 0.7)])
def test_the_noise_of_before_rules_out_a_neighbour(what, where):
    """So a check that passed it would be worth nothing."""
    scale, total, neighbour = 1.34 * 0.6, 0.0123, 0.0117
    publish = PUBLISH[what]
    nearest = round(float(ndtr((where - total) / scale)) * 2.0**52)
    releases = total + normal(np.arange(nearest - 20, nearest + 21)) * scale
    values = [Value(*pair) for pair in zip(publish(releases), releases, strict=True)]

    by_truth = [explained(v, total, scale, publish) for v in values]
    by_other = [explained(v, neighbour, scale, publish) for v in values]

    assert all(by_truth)
    assert by_other.count(False) > 10


class SumOfFloats(ClientLevelDP):
    """Grid noise on a sum that lies beside the grid."""

    def aggregate_train(self, server_round, replies):
        settings, total = self.ledger.settings, np.zeros(self.strategy.size)
        for reply in self.strategy.read(replies):
            total += sum(float(np.sum(v)) for v in reply.arrays.values()) * 1e-9
        noise = self.generator.discrete_gaussian(len(total)) / math.sqrt(VARIANCE)
        total += noise * settings.noise_multiplier * settings.clipping_norm
        self.ledger.spend(server_round)
        update = total / settings.num_sampled_clients
        return self.strategy.apply_update(server_round, update), None


@both
def test_noise_of_the_grid_on_a_sum_beside_it_is_convicted(check):
    with pytest.raises(NotAsPromisedError, match="on the public grid"):
        check(setup_of(SumOfFloats))


@both
def test_noise_on_a_coarser_grid_is_convicted(check, monkeypatch):
    """The sum's own residue would be published."""
    honest = FixedPointSum.noised
    monkeypatch.setattr(
        FixedPointSum, "noised", lambda total, noise: honest(total, noise // 2 * 2)
    )

    passed, text = check(setup_of())

    assert not passed
    assert "CANNOT PUBLISH" in text or "no draw leads" in text


class LeakyAdapter(ClientLevelDP):
    """Adds what has no noise where no spread shows it."""

    def aggregate_train(self, server_round, replies):
        kept = list(replies)
        record, metrics = super().aggregate_train(server_round, kept)
        first = next(iter(self.strategy.reference.values()))
        first += np.float32(1e-6 * len(kept))
        return record, metrics


def test_an_adapter_that_holds_more_than_the_release_is_convicted():
    passed, text = published_values(setup_of(LeakyAdapter))

    assert not passed
    assert "not what the optimiser makes" in text


@pytest.mark.parametrize("part", ["moments", "arrays"])
def test_a_checkpoint_that_holds_more_than_the_releases_is_convicted(monkeypatch, part):
    honest = Checkpoint.write

    def write(checkpoint, directory):
        next(iter(getattr(checkpoint, part).values()))[0] += 1e-3
        honest(checkpoint, directory)

    monkeypatch.setattr(Checkpoint, "write", write)

    passed, text = checkpoint_moments(setup_of())

    assert not passed
    assert "other values than the optimiser makes" in text


def test_a_checkpoint_that_names_the_clients_that_answered_is_convicted(monkeypatch):
    honest = grid_checks._checkpoint

    def checkpoint(bench, num_rounds):
        written, read = honest(bench, num_rounds)
        return written + bytes([bench.strategy.round.answered]), read

    monkeypatch.setattr(grid_checks, "_checkpoint", checkpoint)

    passed, text = checkpoint_moments(setup_of())

    assert not passed
    assert "no draw leads to the same checkpoint" in text


@both
def test_noise_too_small_for_any_neighbour_is_convicted(check):
    keys = {"privacy.target-epsilon": 0.0, "privacy.noise-multiplier": 1e-4}

    with pytest.raises(NotAsPromisedError, match="the noise is too small"):
        check(setup_of(**keys))


def test_draws_that_miss_a_residue_are_seen(monkeypatch):
    """The audit forces draws that a sampler may never take by itself."""
    honest = grid_checks._release

    def release(*args):
        forced = honest(*args)
        uneven = forced.draws // 13 * 13
        return grid_checks._Forced(forced.integers, uneven, forced.by_chance)

    monkeypatch.setattr(grid_checks, "_release", release)

    assert not published_values(setup_of())[0]
