"""A plan for a federation: noise, epsilon and the loss to expect."""

from dataclasses import replace
from typing import Any

from fedllm.adapters.resolve import resolve
from fedllm.config import RunConfig
from fedllm.models.layer_shapes import linear_shapes
from fedllm.planning.frontier import (
    Expected,
    expected,
    load_frontier,
    noise_level,
    step_by_rule,
)
from fedllm.privacy.accounting import Epsilons, calibrate, epsilons, noise_to_signal
from fedllm.privacy.ledger import PrivacySettings
from fedllm.privacy.wording import strength

_WORTH_SAYING = 0.02

# What adapter.target-modules "auto" means for models of Llama's kind.
_LORA_MODULES = (("q_proj", "v_proj"), ())
_IA3_MODULES = (("k_proj", "v_proj", "down_proj"), ("down_proj",))


def num_trainable_of(config: RunConfig) -> int:
    """Return d without loading the model."""
    shapes = linear_shapes(config.model.name)
    defaults = _IA3_MODULES if config.adapter.kind == "ia3" else _LORA_MODULES
    return resolve(config.adapter, shapes, (), defaults, config.seed).num_trainable


def make_plan_report(config: RunConfig, settings: PrivacySettings) -> dict[str, Any]:
    """Return everything that is known beforehand, for --json and for the lines."""
    spent = _spent(settings, settings.planned_rounds)
    return {
        "num_clients": settings.population_size,
        "num_sampled_clients": settings.num_sampled_clients,
        "sampling": settings.sampling,
        "num_rounds": settings.planned_rounds,
        "num_trainable": settings.num_trainable,
        "noise_multiplier": settings.noise_multiplier,
        "epsilon": spent.zero_out,
        "epsilon_replace_one": spent.replace_one,
        "delta": settings.delta,
        "accountant": spent.accountant,
        "strength": strength(spent.zero_out),
        "noise_to_signal": _ratio(settings),
        "server_learning_rate_by_rule": _step(config, settings),
        "expected": _expected_dict(_expect(config.adapter.kind, settings)),
        "better": _better(config, settings),
    }


def _spent(settings: PrivacySettings, rounds: int) -> Epsilons:
    """Return what a number of rounds spends."""
    return epsilons(
        settings.noise_multiplier,
        rounds,
        settings.delta,
        settings.sampling,
        settings.num_sampled_clients / settings.population_size,
    )


def _ratio(settings: PrivacySettings) -> float:
    """Return R."""
    return noise_to_signal(
        settings.noise_multiplier, settings.num_trainable, settings.num_sampled_clients
    )


def _step(config: RunConfig, settings: PrivacySettings) -> float | None:
    """Return the server learning rate that the rule gives; for `ffa-lora` only."""
    if config.adapter.kind != "ffa-lora":
        return None
    level = noise_level(
        settings.noise_multiplier,
        settings.planned_rounds,
        settings.num_sampled_clients,
    )
    return round(step_by_rule(level) * 0.6 / settings.clipping_norm, 3)


def _expect(kind: str, settings: PrivacySettings) -> Expected | None:
    """Return what the frontier says of these settings."""
    level = noise_level(
        settings.noise_multiplier,
        settings.planned_rounds,
        settings.num_sampled_clients,
    )
    return expected(kind, level, load_frontier())


def _expected_dict(found: Expected | None) -> dict[str, Any] | None:
    """Return an expectation for --json."""
    if found is None:
        return None
    return {
        "test_loss": round(found.loss, 3),
        "test_loss_low": round(found.low, 3),
        "test_loss_high": round(found.high, 3),
        "share_of_gain_without_privacy": round(found.share, 3),
        "inside_what_was_measured": found.inside,
        "nearest_clients": found.nearest.clients,
        "nearest_epsilon": found.nearest.epsilon,
        "nearest_rounds": found.nearest.rounds,
    }


def _better(config: RunConfig, settings: PrivacySettings) -> list[dict[str, Any]]:
    """Return changes of one setting each that the frontier expects to lower the loss."""
    now = _expect(config.adapter.kind, settings)
    changes: list[tuple[str, str, PrivacySettings]] = []
    for factor in (2, 5):
        clients = settings.population_size * factor
        more = replace(
            settings,
            population_size=clients,
            num_sampled_clients=settings.num_sampled_clients * factor,
        )
        changes.append((f"{clients} clients", config.adapter.kind, more))
    for epsilon in (2.0, 4.0, 8.0):
        if epsilon > _spent(settings, settings.planned_rounds).zero_out * 1.01:
            weaker = replace(settings, noise_multiplier=_calibrated(settings, epsilon))
            changes.append((f"epsilon {epsilon:g}", config.adapter.kind, weaker))
    for kind in load_frontier().kinds:
        if kind != config.adapter.kind:
            changes.append((f"adapter.kind={kind}", kind, settings))
    out = []
    for what, kind, changed in changes:
        then = _expect(kind, changed)
        # Measured with less noise, another kind would look better than it is.
        if then is not None and kind != config.adapter.kind and then.optimistic:
            continue
        if then is None or (now is not None and then.loss > now.loss - _WORTH_SAYING):
            continue
        out.append({"change": what, "test_loss": round(then.loss, 3)})
    return sorted(out, key=lambda row: float(str(row["test_loss"])))


def _calibrated(settings: PrivacySettings, epsilon: float) -> float:
    """Return the noise multiplier for another epsilon."""
    return calibrate(
        epsilon,
        settings.planned_rounds,
        settings.delta,
        settings.sampling,
        settings.num_sampled_clients / settings.population_size,
    )
