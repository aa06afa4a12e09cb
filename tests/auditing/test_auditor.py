"""The audit passes the real strategy, and convicts every one that is broken."""

import json
import math
import random

import numpy as np
import pytest

from fedllm.auditing.harness import ZeroNoise
from fedllm.errors import PrivacyError
from fedllm.privacy.discrete_gaussian import VARIANCE, integer_sensitivity
from fedllm.privacy.mechanism import checked_update, clipped_update
from fedllm.strategy.client_level_dp import ClientLevelDP
from fedllm.strategy.fedavg import AdapterFedAvg
from tests.helpers.audits import auditor, failed, private


class Altered(ClientLevelDP):
    """A round written anew, in whole numbers; subclasses break one step of it."""

    def aggregate_train(self, server_round, replies):
        settings = self.ledger.settings
        z, clip = settings.noise_multiplier, settings.clipping_norm
        units = integer_sensitivity(z)
        total, count = np.zeros(self.strategy.size), 0
        for reply in self.strategy.read(replies):
            update = self.clipped(reply, clip)
            if update is not None:
                total += np.trunc(self.weight(reply) * update / clip * units)
                count += 1
        noise = self.noise(server_round, len(total), count) * math.sqrt(VARIANCE)
        released = (total + np.rint(noise)) * (clip / units)
        self.spend(server_round)
        return self.move(server_round, released / self.divisor(count), z * clip), None

    def clipped(self, reply, clip):
        return clipped_update(reply.arrays, self.strategy.reference, clip).update

    def weight(self, reply):
        return 1

    def noise(self, server_round, size, count):
        return self.generator.discrete_gaussian(size) / math.sqrt(VARIANCE)

    def divisor(self, count):
        return self.ledger.settings.num_sampled_clients

    def spend(self, server_round):
        self.ledger.spend(server_round)

    def move(self, server_round, update, stddev):
        return self.strategy.apply_update(server_round, update)


class WithoutClipping(Altered):
    def clipped(self, reply, clip):
        return checked_update(reply.arrays, self.strategy.reference, 1e300).update


class ClippedArrayByArray(Altered):
    def clipped(self, reply, clip):
        parts = []
        for name, value in self.strategy.reference.items():
            arrays = {name: (reply.arrays or {}).get(name)}
            update = clipped_update(arrays, {name: value}, clip).update
            parts.append(np.zeros(value.size) if update is None else update)
        return np.concatenate(parts)


class ClippedValueByValue(Altered):
    def clipped(self, reply, clip):
        update = checked_update(reply.arrays, self.strategy.reference, 1e300).update
        return None if update is None else np.clip(update, -clip, clip)


class NanIsNotRefused(Altered):
    def clipped(self, reply, clip):
        if reply.arrays is None:
            return None
        pairs = [(reply.arrays[k], v) for k, v in self.strategy.reference.items()]
        update = np.concatenate([(a - b).ravel() for a, b in pairs]).astype(float)
        return update * min(1.0, clip / max(np.linalg.norm(update), 1e-12))


class HalfTheNoise(Altered):
    def noise(self, server_round, size, count):
        return super().noise(server_round, size, count) / 2


class NoiseWithoutClientsOnly(Altered):
    def noise(self, server_round, size, count):
        return super().noise(server_round, size, count) / max(1, count)


class NoiseOfTheRound(Altered):
    def noise(self, server_round, size, count):
        if isinstance(self.generator, ZeroNoise):
            return np.zeros(size)
        return np.random.default_rng(server_round).standard_normal(size)


class NoiseOfTheConfig(Altered):
    def noise(self, server_round, size, count):
        if isinstance(self.generator, ZeroNoise):
            return np.zeros(size)
        if not hasattr(self, "_stream"):
            self._stream = np.random.default_rng(self.strategy.config.seed)
        return self._stream.standard_normal(size)


class NoiseOfTheGlobalGenerator(Altered):
    def noise(self, server_round, size, count):
        if isinstance(self.generator, ZeroNoise):
            return np.zeros(size)
        return np.random.standard_normal(size)  # noqa: NPY002


class NoiseOfPythonsGenerator(Altered):
    def noise(self, server_round, size, count):
        if isinstance(self.generator, ZeroNoise):
            return np.zeros(size)
        return np.array([random.gauss(0, 1) for _ in range(size)])


class SameNoiseInEveryRound(Altered):
    def noise(self, server_round, size, count):
        if not hasattr(self, "_kept"):
            self._kept = super().noise(server_round, size, count)
        return self._kept


class WeightedByExamples(Altered):
    def weight(self, reply):
        return (reply.num_examples or 10) / 10


class DividedByReplies(Altered):
    def divisor(self, count):
        return max(1, count)


class NoiseAfterTheOptimizer(Altered):
    def noise(self, server_round, size, count):
        return np.zeros(size)

    def move(self, server_round, update, stddev):
        self.strategy.apply_update(server_round, update)
        noise = self.generator.discrete_gaussian(len(update)) / math.sqrt(VARIANCE)
        noise *= stddev / self.ledger.settings.num_sampled_clients
        start = 0
        for name, value in self.strategy.reference.items():
            part = noise[start : start + value.size].reshape(value.shape)
            self.strategy.reference[name] = (value + part).astype(np.float32)
            start += value.size
        from fedllm.wire.messages import array_record

        return array_record(self.strategy.reference)


class NoiseTwice(NoiseAfterTheOptimizer):
    def noise(self, server_round, size, count):
        return self.generator.discrete_gaussian(size) / math.sqrt(VARIANCE)


class PastTheOptimizer(Altered):
    def move(self, server_round, update, stddev):
        from fedllm.wire.messages import array_record

        return array_record(self.strategy.reference)


class ForgetsARound(Altered):
    def spend(self, server_round):
        if server_round != 2:
            self.ledger.spend(server_round)


class SpendsAfterwards(Altered):
    def spend(self, server_round):
        pass

    def move(self, server_round, update, stddev):
        record = super().move(server_round, update, stddev)
        self.ledger.spend(server_round)
        return record


class ErasesTheLastRound(Altered):
    def move(self, server_round, update, stddev):
        record = super().move(server_round, update, stddev)
        if server_round == 3:
            self.ledger._releases.pop()
            self.ledger._write()
        return record


class GivesUpWithoutReplies(Altered):
    def divisor(self, count):
        if count == 0:
            raise RuntimeError("no replies")
        return super().divisor(count)


def making(kind):
    def make(config, reference, population, ledger):
        return kind(AdapterFedAvg(config, reference, population), ledger)

    return make


BROKEN = [
    (WithoutClipping, {"sensitivity", "canaries, the run"}),
    (ClippedArrayByArray, {"sensitivity"}),
    (ClippedValueByValue, {"sensitivity"}),
    (NanIsNotRefused, {"sensitivity"}),
    (HalfTheNoise, {"noise scale", "order"}),
    (NoiseWithoutClientsOnly, {"noise scale", "canaries, the run"}),
    (NoiseOfTheRound, {"fresh noise"}),
    (NoiseOfTheConfig, {"fresh noise"}),
    (NoiseOfTheGlobalGenerator, {"fresh noise"}),
    (NoiseOfPythonsGenerator, {"fresh noise"}),
    (SameNoiseInEveryRound, {"fresh noise"}),
    (WeightedByExamples, {"sensitivity", "weights"}),
    (DividedByReplies, {"sensitivity", "denominator"}),
    (NoiseAfterTheOptimizer, {"noise scale", "order", "canaries, the run"}),
    (NoiseTwice, {"order"}),
    (PastTheOptimizer, {"sensitivity", "order"}),
    (ForgetsARound, {"ledger"}),
    (SpendsAfterwards, {"ledger"}),
    (ErasesTheLastRound, {"ledger"}),
    (GivesUpWithoutReplies, {"noise scale"}),
]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize(
    ("kind", "checks"), BROKEN, ids=lambda x: getattr(x, "__name__", "")
)
def test_a_broken_strategy_is_convicted(kind, checks):
    audit = auditor(make=making(kind)).run()

    assert failed(audit) >= checks
    assert not audit.passed


def test_the_same_round_with_nothing_broken_is_not_convicted():
    audit = auditor(make=making(Altered)).run()

    assert failed(audit) == set()
    assert audit.passed


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"strategy.server-optimizer": "adam", "strategy.server-momentum": 0.5},
        {"strategy.sampling": "fixed", "strategy.fraction-train": 0.5},
        {"strategy.sampling": "poisson", "strategy.fraction-train": 0.5}
        | {"privacy.target-epsilon": 0.0, "privacy.noise-multiplier": 3.0}
        | {"num-server-rounds": 2},
        {"privacy.target-epsilon": 0.0, "privacy.noise-multiplier": 0.02},
        {"privacy.target-epsilon": 0.3, "privacy.clipping-norm": 1e-3},
        {"num-server-rounds": 1, "privacy.clipping-norm": 100.0},
    ],
    ids=lambda keys: " ".join(map(str, keys.values())),
)
def test_the_real_strategy_passes(keys):
    audit = auditor(private(**keys)).run()

    assert failed(audit) == set()
    assert audit.passed
    assert 0 <= audit.rehearsal.certified.epsilon <= audit.rehearsal.accounted


def test_noise_after_a_momentum_is_convicted_by_the_adapter_alone():
    # Even where what enters the optimiser is noised as well.
    keys = {"strategy.server-optimizer": "momentum"}
    audit = auditor(private(**keys), making(NoiseTwice)).run()

    assert failed(audit) == {"order", "published values", "checkpoint moments"}


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({"num_clients": 1}, "--clients: must be at least 2"),
        ({"num_canaries": 0}, "--canaries: must be at least 1"),
        ({"dimension": 999}, "--dimension: must be at least 10 times"),
    ],
)
def test_impossible_sizes_are_one_clear_error(sizes, words):
    with pytest.raises(PrivacyError, match=words):
        auditor(**sizes)


def test_a_budget_for_no_round_leaves_nothing_to_audit():
    keys = {"privacy.target-epsilon": 0.0, "privacy.noise-multiplier": 1.0}

    with pytest.raises(PrivacyError, match="nothing is ever released"):
        auditor(private(**keys, **{"privacy.max-epsilon": 3.0}))


def test_what_was_found_can_be_written_as_json():
    content = auditor().run().as_dict()

    again = json.loads(json.dumps(content, allow_nan=False))

    assert again["passed"] is True
    assert again["rehearsal"]["rounds"] == 3
    assert "never acquit" in again["meaning"]
