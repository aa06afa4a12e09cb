"""What does not go together in a run config: each value is allowed, and the pair is not.

Many rules hold a promise of privacy, so `fedllm.config_parsing` checks every run config by them.
"""

from pathlib import Path

from fedllm.config import (
    FEWEST_TRUSTEES,
    MOST_TRUSTEES,
    PERSONAL_SHARE,
    SMALLEST_DELTA,
    WITHOUT_DROPOUT,
    AdapterConfig,
    DataConfig,
    PersonalConfig,
    PrivacyConfig,
    ResumeConfig,
    RunConfig,
    StrategyConfig,
    TrainConfig,
    key_of,
    trustee_names,
)


def contradictions(config: RunConfig) -> list[str]:
    """Return the settings that are each allowed, but not together."""
    problems = [
        *_adapter_problems(config.adapter),
        *_train_problems(config.train),
        *_objective_problems(config),
        *_strategy_problems(config.strategy),
        *_late_problems(config),
        *_data_problems(config.data),
        *_evaluation_problems(config),
        *_personal_problems(config),
        *_resume_problems(config.resume),
    ]
    if config.privacy.noise == "joint" and config.privacy.unit != "record":
        problems.append(
            "privacy.noise: 'joint' is for privacy.unit='record' (got "
            f"{config.privacy.unit!r}), where the unit is one row"
        )
    problems += _trust_problems(config)
    match config.privacy.unit:
        case "none":
            return problems + _leftovers_without_privacy(config.privacy)
        case "record":
            problems += _joint_problems(config) if config.is_joint else []
            return problems + _noise_problems(config) + _record_problems(config)
        case _:
            return problems + _noise_problems(config) + _client_problems(config)


def _adapter_problems(adapter: AdapterConfig) -> list[str]:
    if adapter.start_is_public and not adapter.start_from:
        return ["adapter.start-is-public: needs adapter.start-from"]
    if adapter.start_from and adapter.kind == "auto":
        return [
            "adapter.kind: must be that of adapter.start-from's adapter (got 'auto')"
        ]
    if adapter.dropout > 0 and adapter.kind in (*WITHOUT_DROPOUT, "auto"):
        return [
            f"adapter.dropout: must be 0.0 if adapter.kind is {adapter.kind!r} "
            f"(got {adapter.dropout}): {', '.join(WITHOUT_DROPOUT)} has no dropout"
            + (", and auto may choose it" if adapter.kind == "auto" else "")
        ]
    return []


def _train_problems(train: TrainConfig) -> list[str]:
    problems = []
    if train.local_steps == 0 and train.local_epochs == 0:
        problems.append("train.local-epochs: must be > 0 if train.local-steps is 0")
    if 0 < train.local_steps <= train.warmup_steps:
        problems.append(
            "train.warmup-steps: must be below train.local-steps "
            f"{train.local_steps}, since the warm-up starts at a rate of zero in each "
            f"round (got {train.warmup_steps})"
        )
    if train.activation_compression and train.gradient_checkpointing:
        problems.append(
            "train.activation-compression: must be false if "
            "train.gradient-checkpointing is true (got true for both): what is computed "
            "again is not kept"
        )
    if train.learning_rate_min > train.learning_rate:
        problems.append(
            "train.learning-rate-min: must be <= train.learning-rate "
            f"{train.learning_rate} (got {train.learning_rate_min})"
        )
    return problems


def _objective_problems(config: RunConfig) -> list[str]:
    train, rows, problems = config.train, config.data.format, []
    if train.objective == "dpo" and rows not in ("auto", "preference"):
        problems.append(
            "data.format: must be 'auto' or 'preference' under train.objective='dpo' (got "
            f"{rows!r}): dpo needs prompt, chosen, rejected"
        )
    if train.objective != "dpo" and rows == "preference":
        problems.append(
            "data.format: 'preference' is for train.objective='dpo' (got "
            f"{train.objective!r}): there is no answer to learn"
        )
    if train.objective != "dpo" and train.dpo_beta != TrainConfig().dpo_beta:
        problems.append(
            f"train.dpo-beta: is for train.objective='dpo' (got {train.dpo_beta})"
        )
    return problems


def _strategy_problems(strategy: StrategyConfig) -> list[str]:
    problems = []
    if strategy.server_learning_rate_min > strategy.server_learning_rate:
        problems.append(
            "strategy.server-learning-rate-min: must be <= "
            f"strategy.server-learning-rate {strategy.server_learning_rate} "
            f"(got {strategy.server_learning_rate_min})"
        )
    if strategy.sampling == "all" and strategy.fraction_train != 1.0:
        problems.append(
            "strategy.fraction-train: must be 1.0 if strategy.sampling is 'all' "
            f"(got {strategy.fraction_train}); for a part of the clients set "
            "strategy.sampling to 'fixed' or 'poisson'"
        )
    if strategy.num_clients == 1:
        problems.append("strategy.num-clients: must be 0 or at least 2 (got 1)")
    return problems


def _late_problems(config: RunConfig) -> list[str]:
    """Return what does not go with replies that count later, or with a round that closes early."""
    strategy, unit, problems = config.strategy, config.privacy.unit, []
    why = ""
    if config.is_joint:
        why = "privacy.noise='joint' (a step's noise is for the batches of that step)"
    elif unit == "record":
        why = "privacy.unit='record' (a client pays for an update of the round it was made for)"
    elif config.is_sealed:
        why = (
            "privacy.trust='trustees' (what comes after a round is opened stays sealed)"
        )
    elif unit == "client" and strategy.sampling == "poisson":
        why = (
            "strategy.sampling='poisson' (no coin of the later round drew that client)"
        )
    if strategy.late_replies != "drop" and why:
        problems.append(
            f"strategy.late-replies: must be 'drop' under {why} (got "
            f"{strategy.late_replies!r})"
        )
    if strategy.min_replies and unit != "none":
        problems.append(
            f"strategy.min-replies: must be 0 under privacy.unit={unit!r} (got "
            f"{strategy.min_replies}): one client less would let another's reply in"
        )
    return problems


def _data_problems(data: DataConfig) -> list[str]:
    """Return what is wrong with the encoding.

    One that gives ASCII's bytes another meaning could move where a row of a client's file
    ends, by what the row holds.
    """
    if not data.encoding:
        return []
    ascii_bytes = bytes(range(128))
    try:
        keeps_ascii = ascii_bytes.decode(data.encoding) == ascii_bytes.decode("ascii")
    except (LookupError, UnicodeError, ValueError):
        keeps_ascii = False
    if keeps_ascii:
        return []
    return [
        "data.encoding: must be an encoding that Python knows and that has ASCII in it, "
        f"such as 'cp1252', 'latin-1' or 'gb18030' (got {data.encoding!r}); UTF-16 is known "
        "by its mark"
    ]


def _evaluation_problems(config: RunConfig) -> list[str]:
    held_out, share = config.data.held_out_fraction, config.strategy.fraction_evaluate
    problems = []
    if (share > 0) != (held_out > 0):
        problems.append(
            "data.held-out-fraction: must be above 0.0 if strategy.fraction-evaluate "
            f"is, and 0.0 otherwise (got {held_out} and {share}): clients evaluate on "
            "rows that none trains on"
        )
    if share > 0 and config.privacy.unit != "none":
        problems.append(
            "strategy.fraction-evaluate: must be 0.0 under "
            f"privacy.unit={config.privacy.unit!r} (got {share}): clients' losses would "
            "leave without noise"
        )
    return problems


def _personal_problems(config: RunConfig) -> list[str]:
    personal, problems = config.personal, []
    usual = PersonalConfig()
    for name in ("learning_rate", "proximal_mu"):
        got = getattr(personal, name)
        if not config.is_personal and got != getattr(usual, name):
            problems.append(
                f"personal.{key_of(name)}: is for personal.epochs above 0.0 (got {got}, and "
                "0.0 epochs): no personal adapter is trained"
            )
    held_out = config.data.held_out_fraction
    if config.is_personal and held_out + PERSONAL_SHARE >= 1:
        problems.append(
            f"data.held-out-fraction: must be below {1 - PERSONAL_SHARE:g} if "
            f"personal.epochs is above 0.0 (got {held_out}): another tenth is held out for "
            "the personal adapter"
        )
    return problems


def _resume_problems(resume: ResumeConfig) -> list[str]:
    if resume.from_ in ("", "latest") or Path(resume.from_).is_absolute():
        return []
    return [
        "resume.from: must be empty, 'latest', or the absolute path of a run folder "
        f"(got {resume.from_!r})"
    ]


def _noise_problems(config: RunConfig) -> list[str]:
    """Return what is wrong with the noise settings, under either unit."""
    privacy, problems = config.privacy, []
    if privacy.target_epsilon > 0 and privacy.noise_multiplier > 0:
        problems.append(
            "privacy.noise-multiplier: set either this or privacy.target-epsilon, not "
            f"both (got {privacy.noise_multiplier} and {privacy.target_epsilon}); "
            "0.0 means not set, so add privacy.target-epsilon=0.0"
        )
    if privacy.target_epsilon == 0 and privacy.noise_multiplier == 0:
        problems.append(
            "privacy.target-epsilon: one of this and privacy.noise-multiplier must be "
            "above 0.0 (got 0.0 for both); for no privacy set privacy.unit='none'"
        )
    if 0 < privacy.delta < SMALLEST_DELTA:
        problems.append(
            f"privacy.delta: must be 0.0 or at least {SMALLEST_DELTA:g} (got "
            f"{privacy.delta}): below, the accountants' own rounding decides"
        )
    if 0 < privacy.max_epsilon < privacy.target_epsilon:
        problems.append(
            "privacy.max-epsilon: must be 0.0 or at least privacy.target-epsilon "
            f"{privacy.target_epsilon} (got {privacy.max_epsilon})"
        )
    return problems


def _record_problems(config: RunConfig) -> list[str]:
    problems = []
    if config.model.quantization == 8:
        problems.append(
            "model.quantization: must be 0 or 4 under privacy.unit='record' (got 8): in "
            "8 bit the outliers of one example change how its whole batch is rounded"
        )
    if config.train.activation_compression:
        problems.append(
            "train.activation-compression: must be false under privacy.unit='record' (got "
            "true): examples that share a block would change one another's gradients"
        )
    if config.train.plugin:
        problems.append(
            "train.plugin: must be empty under privacy.unit='record' (got "
            f"{config.train.plugin!r}): only fedllm's own step may touch an example's gradient"
        )
    if config.adapter.dropout > 0:
        problems.append(
            "adapter.dropout: must be 0.0 under privacy.unit='record' (got "
            f"{config.adapter.dropout}): one example more would change the masks of others"
        )
    if config.adapter.kind == "auto":
        problems.append(
            "adapter.kind: name one under privacy.unit='record' (got 'auto', which knows "
            "what was measured at client level); 'lora-core' bears noise best"
        )
    return problems


# What a client's own optimiser would read: under `joint` the server alone takes steps.
_UNREAD_IF_JOINT = (
    "optimizer",
    "learning_rate",
    "learning_rate_min",
    "warmup_steps",
    "weight_decay",
    "max_grad_norm",
    "proximal_mu",
)


def _joint_problems(config: RunConfig) -> list[str]:
    """Return what does not go with one noise for the whole federation."""
    train, strategy, problems = config.train, config.strategy, []
    if strategy.aggregator != "mean":
        problems.append(
            "strategy.aggregator: must be 'mean' under privacy.noise='joint' (got "
            f"{strategy.aggregator!r}): the bound is proved for a sum"
        )
    if train.local_steps != 1:
        problems.append(
            "train.local-steps: must be 1 under privacy.noise='joint' (got "
            f"{train.local_steps}): every step is a round; several local steps need "
            "privacy.noise='local'"
        )
    if strategy.sampling != "all":
        problems.append(
            "strategy.sampling: must be 'all' under privacy.noise='joint' (got "
            f"{strategy.sampling!r}): the coins are those of rows, and all clients toss "
            "theirs in every step"
        )
    defaults = TrainConfig()
    for name in _UNREAD_IF_JOINT:
        got, usual = getattr(train, name), getattr(defaults, name)
        if got != usual:
            problems.append(
                f"train.{key_of(name)}: must be {usual!r} under privacy.noise='joint' (got "
                f"{got!r}): the server takes the step, by strategy.server-optimizer and "
                "strategy.server-learning-rate"
            )
    return problems


def _trust_problems(config: RunConfig) -> list[str]:
    """Return what is wrong with the settings of who is trusted."""
    privacy, usual = config.privacy, PrivacyConfig()
    if privacy.trust == "server":
        return [
            f"privacy.{key_of(name)}: is for privacy.trust='trustees' (got "
            f"{getattr(privacy, name)!r})"
            for name in (
                "trustees",
                "least_trustees",
                "colluding_trustees",
                "post_quantum",
            )
            if getattr(privacy, name) != getattr(usual, name)
        ]
    if privacy.unit == "none" or (privacy.unit, privacy.noise) == ("record", "local"):
        why = {
            "none": "there is no noise",
            "record": "under privacy.noise='local' each client's own noise protects its rows already",
        }[privacy.unit]
        return [
            "privacy.trust: 'trustees' is for privacy.unit='client', or 'record' with "
            f"privacy.noise='joint' (got {privacy.unit!r}): {why}"
        ]
    return _sealed_problems(config)


def _sealed_problems(config: RunConfig) -> list[str]:
    """Return what does not go with a server that is not trusted."""
    privacy, problems = config.privacy, []
    if config.strategy.sampling == "poisson":
        problems.append(
            "strategy.sampling: must be 'all' or 'fixed' under privacy.trust='trustees' (got "
            "'poisson'): the server, which is not trusted, knows who was drawn, so that "
            "secret coins amplify nothing against it"
        )
    try:
        names = trustee_names(privacy.trustees)
    except ValueError as error:
        return [*problems, f"privacy.trustees: {error}"]
    count, least = len(names), privacy.least_trustees or len(names)
    if not FEWEST_TRUSTEES <= count <= MOST_TRUSTEES:
        problems.append(
            f"privacy.trustees: must name {FEWEST_TRUSTEES} to {MOST_TRUSTEES} trustees, "
            f"separated by commas (got {privacy.trustees!r})"
        )
    elif not FEWEST_TRUSTEES <= least <= count:
        problems.append(
            f"privacy.least-trustees: must be 0, or {FEWEST_TRUSTEES} to the {count} that "
            f"privacy.trustees names (got {least})"
        )
    elif privacy.colluding_trustees >= least:
        problems.append(
            f"privacy.colluding-trustees: must be below the {least} trustees of a round, of "
            f"which one has to be honest (got {privacy.colluding_trustees})"
        )
    return problems


def _client_problems(config: RunConfig) -> list[str]:
    if config.strategy.aggregator == "mean":
        return []
    return [
        "strategy.aggregator: must be 'mean' under privacy.unit='client' "
        f"(got {config.strategy.aggregator!r}): the bound is proved for a sum"
    ]


def _leftovers_without_privacy(privacy: PrivacyConfig) -> list[str]:
    """Return an error for a noise setting that privacy.unit='none' would ignore."""
    if privacy.noise_multiplier > 0 or privacy.max_epsilon > 0:
        return [
            "privacy.unit: 'none' adds no noise, but privacy.noise-multiplier or "
            "privacy.max-epsilon is set; leave those at 0.0"
        ]
    return []
