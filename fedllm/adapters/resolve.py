"""An adapter's settings resolved against a base model's linear layers, without its weights."""

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from fedllm.adapters.kinds import KINDS, ia3
from fedllm.adapters.spec import AdapterSpec
from fedllm.config import AdapterConfig, RunConfig
from fedllm.errors import AdapterError, ConfigError

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def with_kind(config: RunConfig, kind: object) -> RunConfig:
    """Return a run config whose `auto` is resolved; any other kind stays as it is.

    Args:
        config: The run config.
        kind: What the server names.

    Raises:
        ConfigError: The run says `auto`, and the name is not of the closed list.
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
    linears, heads = _linear_shapes(model_config)
    defaults = _default_modules(config.kind, model_config.model_type)
    return resolve(config, linears, heads, defaults, seed)


def resolve(
    config: AdapterConfig,
    linears: Mapping[str, tuple[int, int]],
    heads: Collection[str],
    defaults: tuple[Collection[str], Collection[str]],
    seed: int,
) -> AdapterSpec:
    """Resolve an adapter against a base model's linear layers, without torch.

    Args:
        config: The adapter's settings, with a kind that is not `auto`.
        linears: Full name of every linear layer -> (out features, in features).
        heads: Names of output heads, which are not adapted.
        defaults: Last parts of the names of the modules that `auto` means, and of those
            whose input is rescaled (IA3).
        seed: Public seed of what is fixed.

    Raises:
        AdapterError: No module matches, or the rank is above a module's size.
    """
    by_default, feedforward = defaults
    wanted = {part.strip() for part in config.target_modules.split(",") if part.strip()}
    if wanted == {"auto"}:
        wanted = set(by_default)
    if wanted == {"all-linear"}:
        modules = {name: shape for name, shape in linears.items() if name not in heads}
    else:
        matched = {t: [n for n in linears if _matches(n, t)] for t in wanted}
        missing = sorted(target for target, names in matched.items() if not names)
        if missing or not wanted:
            known = sorted({name.rsplit(".", 1)[-1] for name in linears})
            raise AdapterError(
                f"adapter.target-modules: {', '.join(missing) or 'nothing named'}: no "
                f"such linear layer in this model; it has {', '.join(known)}"
            )
        chosen = {name for names in matched.values() for name in names}
        if met := sorted(chosen.intersection(heads)):
            raise AdapterError(
                f"adapter.target-modules: {', '.join(met)} is the "
                "output head, which is not adapted; leave it out"
            )
        modules = {name: linears[name] for name in chosen}
    if not modules:
        raise AdapterError(
            "adapter.target-modules: this model has no linear layer to adapt"
        )
    largest = min(min(shape) for shape in modules.values())
    # IA3 has no rank, and VeRA's may pass a side: its factors are not a decomposition.
    if config.kind not in ("ia3", "vera") and config.rank > largest:
        raise AdapterError(
            f"adapter.rank: must be at most {largest}, the smallest side of the target "
            f"modules (got {config.rank})"
        )
    inward = {m for m in modules if any(_matches(m, f) for f in feedforward)}
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


def _default_modules(kind: str, model_type: str) -> tuple[list[str], list[str]]:
    """Return what `auto` means for a kind, and which modules have their input adapted."""
    if kind == "ia3":
        return ia3.default_modules(model_type)
    return ["q_proj", "v_proj"], []


def _linear_shapes(
    model_config: "PretrainedConfig",
) -> tuple[dict[str, tuple[int, int]], set[str]]:
    """Return every linear layer's (out, in), and the names of output heads."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(model_config, trust_remote_code=False)
    head = model.get_output_embeddings()
    shapes, heads = {}, set()
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            shapes[name] = (module.out_features, module.in_features)
            if module is head:
                heads.add(name)
    return shapes, heads


def _peft_targets(chosen: set[str], linears: set[str]) -> tuple[str, ...]:
    """Return names by which PEFT adapts exactly the chosen modules: short, if they do."""
    short = {name.rsplit(".", 1)[-1] for name in chosen}
    meant = {name for name in linears if name.rsplit(".", 1)[-1] in short}
    return tuple(sorted(short if meant == chosen else chosen))


def _matches(name: str, target: str) -> bool:
    """Tell whether PEFT would take `target` to mean this module."""
    return name == target or name.endswith("." + target)
