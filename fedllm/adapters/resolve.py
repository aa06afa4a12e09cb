"""Resolve an adapter's settings against a base model's linear layers, without weights."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from fedllm.adapters.kinds import KINDS
from fedllm.adapters.kinds.kind import Shape, Targets
from fedllm.adapters.linear_layers import linear_layers
from fedllm.adapters.spec import AdapterSpec
from fedllm.config import AdapterConfig, RunConfig
from fedllm.errors import AdapterError, ConfigError

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def with_kind(config: RunConfig, kind: object) -> RunConfig:
    """Return a run config whose `auto` is resolved; any other kind stays as it is.

    Args:
        config: The run config.
        kind: The kind that the server names.

    Raises:
        ConfigError: The run's kind is `auto`, and the name is not of the closed list.
    """
    if config.adapter.kind != "auto":
        return config
    for known in KINDS:
        if kind == known:
            return replace(config, adapter=replace(config.adapter, kind=known))
    raise ConfigError(
        f"adapter.kind: is 'auto', for which the server must name one of "
        f"{', '.join(KINDS)} (got {kind!r})"
    )


def adapter_spec(
    config: AdapterConfig, model_config: "PretrainedConfig", seed: int
) -> AdapterSpec:
    """Resolve an adapter against a base model's configuration, without its weights.

    Args:
        config: The adapter's settings, with a kind that is not `auto`.
        model_config: The base model's configuration.
        seed: Public seed of what is fixed.

    Raises:
        AdapterError: No module matches, or the rank is above a module's size.
    """
    linears, excluded = linear_layers(model_config)
    return resolve(config, linears, excluded, model_config.model_type, seed)


def resolve(
    config: AdapterConfig,
    linears: Mapping[str, Shape],
    excluded: Mapping[str, str],
    model_type: str,
    seed: int,
) -> AdapterSpec:
    """Resolve an adapter against a base model's linear layers, without torch.

    Args:
        config: The adapter's settings, with a kind that is not `auto`.
        linears: Full name of every linear layer -> (out features, in features).
        excluded: Those of them that are not adapted -> why not.
        model_type: The architecture, as in a model's config.json.
        seed: Public seed of what is fixed.

    Raises:
        AdapterError: No module matches, or the rank is above a module's size.
    """
    kind = KINDS[config.kind]
    free = {name: shape for name, shape in linears.items() if name not in excluded}
    defaults, rescaled = _first_that_exists(kind.default_modules(model_type), free)
    modules = _adapted_modules(_targets(config, defaults), free, excluded)
    largest = kind.max_rank(modules.values())
    if largest is not None and config.rank > largest:
        raise AdapterError(
            f"adapter.rank: must be at most {largest}, the smallest side of the target "
            f"modules (got {config.rank})"
        )
    inward = {m for m in modules if any(_matches(m, f) for f in rescaled)}
    inward_targets = _peft_targets(inward, set(linears))
    outward_targets = _peft_targets(set(modules) - inward, set(linears))
    return AdapterSpec(
        kind=config.kind,
        rank=config.rank,
        alpha=config.alpha,
        dropout=config.dropout,
        target_modules=tuple(sorted({*inward_targets, *outward_targets})),
        modules=dict(sorted(modules.items())),
        seed=seed,
        feedforward=inward_targets,
    )


def _targets(config: AdapterConfig, defaults: Collection[str]) -> set[str]:
    """Return the names in `adapter.target-modules`; `auto` becomes the kind's defaults."""
    parts = (part.strip() for part in config.target_modules.split(","))
    targets = {part for part in parts if part}
    return set(defaults) if targets == {"auto"} else targets


def _first_that_exists(choices: Sequence[Targets], free: Collection[str]) -> Targets:
    """Return the first choice whose modules the model all has; the first one if none."""
    for targets, rescaled in choices:
        if all(any(_matches(name, target) for name in free) for target in targets):
            return targets, rescaled
    return choices[0]


def _adapted_modules(
    targets: set[str], free: Mapping[str, Shape], excluded: Mapping[str, str]
) -> dict[str, Shape]:
    """Return the linear layers that targets name, full name -> (out, in).

    Args:
        targets: Names, or last parts of names; `all-linear` alone means all that are free.
        free: The layers that may be adapted.
        excluded: The others -> why not.

    Raises:
        AdapterError: A target names no layer, or none that may be adapted.
    """
    if targets == {"all-linear"}:
        modules = dict(free)
    else:
        matched = {t: [n for n in free if _matches(n, t)] for t in targets}
        missing = sorted(target for target, names in matched.items() if not names)
        for target in missing:
            for name, reason in excluded.items():
                if _matches(name, target):
                    raise AdapterError(f"adapter.target-modules: {target} {reason}")
        if missing or not targets:
            known = sorted({name.rsplit(".", 1)[-1] for name in free})
            raise AdapterError(
                f"adapter.target-modules: {', '.join(missing) or 'nothing named'}: no "
                f"such linear layer in this model; it has {', '.join(known)}"
            )
        chosen = {name for names in matched.values() for name in names}
        modules = {name: free[name] for name in chosen}
    if not modules:
        raise AdapterError(
            "adapter.target-modules: this model has no linear layer to adapt"
        )
    return modules


def _peft_targets(chosen: set[str], linears: set[str]) -> tuple[str, ...]:
    """Return names by which PEFT adapts exactly the chosen modules; short ones if they do."""
    short = {name.rsplit(".", 1)[-1] for name in chosen}
    meant = {name for name in linears if name.rsplit(".", 1)[-1] in short}
    return tuple(sorted(short if meant == chosen else chosen))


def _matches(name: str, target: str) -> bool:
    """Return whether PEFT takes `target` to mean this module."""
    return name == target or name.endswith("." + target)
