"""The run config: what `[tool.flwr.app.config]` and `--run-config` may say.

Flower hands the apps a flat mapping of dotted kebab-case keys to bool, int, float or
str. `parse_run_config` turns it into frozen sections, or names every bad key at once.
The defaults here and those of pyproject.toml are the same; a test walks both.

Keys that change what privacy is promised are all in `PrivacyConfig`, together with
`strategy.sampling`, `strategy.fraction-train` and `num-server-rounds`.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import field, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    ConfigDict,
    Field,
    Strict,
    TypeAdapter,
    ValidationError,
)
from pydantic.dataclasses import dataclass

from fedllm.errors import ConfigError

Scalar = bool | int | float | str

SMALLEST_DELTA = 1e-12
"""The smallest `privacy.delta`: below it the accountants' own rounding decides."""
LARGEST_DELTA = 1e-3
"""The largest `privacy.delta`: a promise that fails more often than this is none."""

TRUSTEE_NAME = re.compile(r"[a-z0-9]([a-z0-9.-]{0,61}[a-z0-9])?")
"""A trustee's name, as in a host name."""
FEWEST_TRUSTEES, MOST_TRUSTEES = 2, 10
"""How many trustees a run may have."""

PERSONAL_SHARE = 0.1
"""Expected share of a client's rows that is held out for its personal adapter."""

_SECTION = ConfigDict(
    extra="forbid",
    alias_generator=lambda name: _key(name),
    validate_by_name=True,
    validate_by_alias=True,
    allow_inf_nan=False,
    use_attribute_docstrings=True,
)

AdapterKind = Literal["ffa-lora", "lora-core", "lora", "ia3", "vera", "auto"]
WITHOUT_DROPOUT = ("ia3",)
"""Kinds without dropout, as `fedllm.adapters.kinds` declares them (a test compares)."""
Encoding = Literal["float32", "float16", "int8"]
Text = Annotated[str, Strict()]
Name = Annotated[str, Strict(), Field(min_length=1)]
Flag = Annotated[bool, Strict()]
Count = Annotated[int, Strict(), Field(ge=0)]
Positive = Annotated[int, Strict(), Field(ge=1)]
Amount = Annotated[float, Strict(), Field(ge=0)]
PositiveAmount = Annotated[float, Strict(), Field(gt=0)]

# Far outside, products with C lose digits, and a clipped norm could pass it.
Norm = Annotated[float, Strict(), Field(ge=1e-9, le=1e9)]
Share = Annotated[float, Strict(), Field(ge=0, le=1)]


def _key(name: str) -> str:
    """Return the key of an attribute; one underscore ends a name that Python keeps."""
    return name.removesuffix("_").replace("_", "-")


def _bits(value: int) -> int:
    """Raise if bitsandbytes does not have this width."""
    if value not in (0, 4, 8):
        raise ValueError("must be 0, 4 or 8")
    return value


def _function_name(value: str) -> str:
    """Raise unless a text is empty or `module:function`."""
    parts = value.split(":")
    if value and (len(parts) != 2 or not all(_is_dotted(part) for part in parts)):
        raise ValueError("must be 'module:function', or empty")
    return value


def _is_dotted(text: str) -> bool:
    return all(part.isidentifier() for part in text.split("."))


def fedllm_home() -> Path:
    """Return the folder that holds models and runs: FEDLLM_HOME, else ~/.fedllm."""
    return Path(os.environ.get("FEDLLM_HOME") or "~/.fedllm").expanduser().absolute()


@dataclass(frozen=True, config=_SECTION)
class ModelConfig:
    """The base model, which stays frozen."""

    name: Name = "smollm2-135m-instruct"
    """`smollm2-135m-instruct`, a local folder, or a hub id, pinned as `owner/name@commit`."""
    quantization: Annotated[int, Strict(), AfterValidator(_bits)] = 4
    """Bits of the base model's linear layers: 4 (nf4), 8, or 0 (not quantised)."""
    quantize_embeddings: Flag = False
    """Keep the input embeddings in nf4 and the output head in 8 bit; only for a base in
    which they are two matrices (OpenLLaMA; not SmolLM2)."""


@dataclass(frozen=True, config=_SECTION)
class AdapterConfig:
    """The adapter, which travels and is trained."""

    kind: AdapterKind = "ffa-lora"
    """`ffa-lora` trains LoRA's B, `lora-core` an r x r core, `lora` both factors, `ia3` a
    factor for each output or input, `vera` two vectors a module; `auto`: the server takes
    the one with the best expected result."""
    rank: Annotated[int, Strict(), Field(ge=1, le=1024)] = 8
    """Rank r of the update of each target module; `ia3` has none and does not use it."""
    alpha: PositiveAmount = 16.0
    """The update is scaled by alpha / rank; `ia3` and `vera` do not use it."""
    dropout: Annotated[float, Strict(), Field(ge=0, lt=1)] = 0.0
    """Dropout on the adapter's input while training; `ia3` has none and allows only 0.0."""
    target_modules: Name = "auto"
    """Names of linear layers, separated by commas, or `all-linear`. `auto`: queries and
    values, by PEFT's table or as the architecture names them; for `ia3` PEFT's choice (Llama:
    `k_proj`, `v_proj` and `down_proj`)."""
    start_from: Text = ""
    """Folder of a PEFT adapter, on the server, that is round 0: one of an earlier run, whose
    client-level epsilon then counts in this run's, or any other; empty: an adapter that
    leaves the base unchanged."""
    start_is_public: Flag = False
    """The owner's word that nothing in the start adapter comes from anybody's private rows;
    then no earlier run counts."""


@dataclass(frozen=True, config=_SECTION)
class DataConfig:
    """Training rows, how virtual clients share them, and rows declared public."""

    name: Name = "wordnet-medical"
    """`wordnet-medical`, a hub id, pinned as `owner/name@commit`, a local file or folder, or
    `own`: each client's own rows (data-path) alone, judged by none of the package's."""
    config: Text = ""
    """Config of a hub data set, or of a folder that holds several; empty: its only one."""
    split: Name = "train"
    """Split of a hub data set, or of a folder with files of several splits."""
    encoding: Text = ""
    """Encoding of text files, such as `cp1252`; empty: UTF-8, or UTF-16 after its mark."""
    format: Literal["auto", "messages", "question-answer", "text", "preference"] = (
        "auto"
    )
    """What rows are; `auto`: by the columns that each row has. `preference`, which
    train.objective='dpo' sets: prompt, chosen and rejected."""
    prompt_column: Name = "instruction"
    """Column with the question. At its default other usual names are tried too."""
    response_column: Name = "response"
    """Column with the answer, which the loss sees. At its default as the one before."""
    input_column: Text = "auto"
    """Column whose text stands after the question; `auto`: `input`, else `context`;
    empty: none."""
    system_column: Text = "auto"
    """Column with the system turn; `auto`: `system`, else `system_prompt`; empty: none."""
    text_column: Name = "text"
    """Column with text of which every token is learned, if there is no question."""
    merge_turns: Flag = False
    """Whether turns of one role in a row, and then the system turn and the first question,
    become one where the chat template refuses them."""
    long_questions: Literal["leave-out", "cut-left"] = "leave-out"
    """What becomes of a row whose question leaves no room for the answer within
    train.max-length: `cut-left` drops the beginning of the question."""
    person_column: Text = ""
    """Column that names whose row it is; under privacy.unit='record' all rows of one person
    in one client are one record; empty: each row is one. Partitions keep persons whole."""
    partition: Literal["iid", "dirichlet", "natural", "size-skew"] = "iid"
    """How virtual clients share the rows (a SuperNode's own file is not shared)."""
    partition_alpha: PositiveAmount = 0.5
    """Concentration of `dirichlet`: smaller is more uneven."""
    partition_column: Name = "site"
    """Column that `dirichlet` and `natural` go by."""
    held_out_fraction: Annotated[float, Strict(), Field(ge=0, lt=1)] = 0.0
    """Expected share of its rows that a client never trains on, and evaluates on
    (strategy.fraction-evaluate; without DP only)."""
    public_validation: Text = ""
    """File of rows declared public that choose the best round; empty: none."""
    public_test: Text = ""
    """File of rows declared public that only report; empty: none."""
    public_train: Text = ""
    """File of rows declared public that the server trains on before round 1, at no cost of
    privacy; empty: none."""


@dataclass(frozen=True, config=_SECTION)
class TrainConfig:
    """Training on one client in one round."""

    objective: Literal["sft", "dpo"] = "sft"
    """`sft`: the answers are learned; `dpo`: of two answers the chosen one is preferred, with
    the base model as the reference (columns prompt, chosen and rejected)."""
    dpo_beta: PositiveAmount = 0.1
    """Under `dpo`: how dear it is to move away from the base model."""
    batch_size: Positive = 8
    """Examples in one micro-batch."""
    local_steps: Count = 10
    """Optimiser steps a round; 0: `train.local-epochs` counts instead."""
    local_epochs: Amount = 1.0
    """Passes over the client's examples a round, if local-steps is 0."""
    gradient_accumulation: Positive = 1
    """Micro-batches in one optimiser step."""
    gradient_checkpointing: Flag = False
    """Recompute activations in the backward pass, and read a cached base again: less memory, more time."""
    activation_compression: Flag = False
    """Keep activations in 8 bit until the backward pass; gradients are approximate."""
    max_length: Annotated[int, Strict(), Field(ge=8)] = 512
    """Longest example in tokens; the client's log has how many it cuts."""
    optimizer: Literal["sgd", "adamw"] = "sgd"
    """Optimiser on the client; its state lasts one round."""
    learning_rate: PositiveAmount = 0.45
    """Learning rate in round 1."""
    learning_rate_min: Amount = 0.45
    """Learning rate in the last round; between them a half cosine."""
    warmup_steps: Count = 0
    """Steps of linear warm-up in each round."""
    weight_decay: Amount = 0.0
    """Decoupled weight decay of the trained values."""
    max_grad_norm: Amount = 0.0
    """Clip the gradient of a step to this norm; 0.0: do not. Not a privacy bound."""
    public_epochs: PositiveAmount = 4.0
    """Most passes of the server over data.public-train, of which a tenth stops it."""
    public_learning_rate: PositiveAmount = 0.002
    """Adam's learning rate there, which falls by half a cosine."""
    proximal_mu: Amount = 0.0
    """FedProx: weight of the pull towards the round's global adapter."""
    plugin: Annotated[Text, AfterValidator(_function_name)] = ""
    """`module:function` of a package that is installed on every node: what it returns is a
    trainer callback or a collator; empty: none. A node that runs the app of its owner's choice
    demands the same in its own config (`train-plugin`)."""

    @property
    def expected_batch_size(self) -> int:
        """Records that a Poisson batch has on average, under `privacy.unit="record"`."""
        return self.batch_size * self.gradient_accumulation


@dataclass(frozen=True, config=_SECTION)
class StrategyConfig:
    """Who takes part in a round and what the server does with the replies."""

    num_clients: Count = 0
    """Clients in the federation; 0: those connected when the run starts."""
    wait_for_clients: PositiveAmount = 120.0
    """Seconds to wait until that many (at least two) are connected."""
    sampling: Literal["all", "fixed", "poisson"] = "all"
    """Every client, a fixed number, or each by its own secret coin."""
    fraction_train: Annotated[float, Strict(), Field(gt=0, le=1)] = 1.0
    """Share of the clients in a round, for `fixed` and `poisson`."""
    fraction_evaluate: Share = 0.0
    """Share of the clients that evaluate on their own held-out rows after a round (without
    DP only; with data.held-out-fraction)."""
    round_timeout: PositiveAmount = 1800.0
    """Seconds to wait for the replies of a round; later ones count as zero, or as
    strategy.late-replies says."""
    late_replies: Literal["drop", "next-round"] = "drop"
    """`drop`, or `next-round`: a reply that comes too late, and within another round-timeout,
    counts in the round that is open then; its client is not asked meanwhile. Those of the last
    round are dropped."""
    min_replies: Count = 0
    """Close a round once this many usable replies have come; 0: wait for all. Without DP only."""
    aggregator: Literal["mean", "median", "trimmed-mean", "krum"] = "mean"
    """How updates are combined; under client-level DP always the mean."""
    malicious_share: Annotated[float, Strict(), Field(ge=0, lt=0.5)] = 0.2
    """Share of hostile clients that `trimmed-mean` and `krum` allow for."""
    server_optimizer: Literal["none", "momentum", "adam", "yogi"] = "none"
    """What the server does with the mean update, after the noise."""
    server_learning_rate: PositiveAmount = 1.33
    """Factor on the (noised) mean update in round 1."""
    server_learning_rate_min: Amount = 1.33
    """The same in the last round; between them a half cosine."""
    server_momentum: Annotated[float, Strict(), Field(ge=0, lt=1)] = 0.9
    """Decay of the first moment for `momentum`, `adam` and `yogi`."""
    evaluate_examples: Count = 128
    """Public validation rows scored after a round; 0: none."""
    evaluate_every: Positive = 1
    """Rounds between two evaluations; the last round is always evaluated."""

    @property
    def reply_seconds(self) -> float:
        """Seconds after its message in which a client's reply can still count."""
        return self.round_timeout * (2 if self.late_replies == "next-round" else 1)

    def num_sampled(self, population_size: int) -> int:
        """Return how many clients a round asks under `all` and `fixed`, at least 1."""
        if self.sampling == "all":
            return population_size
        return max(1, round(self.fraction_train * population_size))

    def expected_cohort(self, population_size: int) -> float:
        """Return n, the divisor of a round's sum: the expected number under `poisson`."""
        if self.sampling == "poisson":
            return self.fraction_train * population_size
        return self.num_sampled(population_size)


@dataclass(frozen=True, config=_SECTION)
class PrivacyConfig:
    """What is promised to whom. Exactly one of the two noise settings is set."""

    unit: Literal["client", "record", "none"] = "client"
    """`client`: all data of one client; `record`: one training row; `none`: nothing."""
    noise: Literal["local", "joint"] = "local"
    """Under `record`: `local`, each client noises each of its steps for itself; `joint`, the
    server, which is trusted, or the trustees noise the sum of all clients once, and every step
    is a round (train.batch-size times train.gradient-accumulation: the expected batch of all clients
    together)."""
    trust: Literal["server", "trustees"] = "server"
    """Under `client`, and `record` with joint noise: `server`, which sees each update and adds the
    noise; `trustees`, nodes that open only the sum of a round's encrypted updates, each with
    its share of the noise."""
    trustees: Text = ""
    """Names of the trustees, separated by commas, under `trustees`; in a simulation the first
    virtual nodes are they."""
    least_trustees: Count = 0
    """Fewest trustees of a round; 0: all that `privacy.trustees` names."""
    colluding_trustees: Count = 1
    """How many trustees may help the server before the promise ends; the noise of the others
    alone is enough for it."""
    post_quantum: Flag = True
    """Seal to the trustees by ML-KEM-768 and X25519 together; false: by X25519 alone."""
    clipping_norm: Norm = 1.5
    """Largest L2 norm C of one client's update, under `client`."""
    max_grad_norm: Norm = 1.0
    """Largest L2 norm of one example's gradient, under `record`."""
    target_epsilon: Amount = 8.0
    """Calibrate the noise to spend this over all rounds; 0.0: not set."""
    noise_multiplier: Amount = 0.0
    """Noise standard deviation over the norm, for an expert; 0.0: not set."""
    delta: Annotated[float, Strict(), Field(ge=0, le=LARGEST_DELTA)] = 0.0
    """Delta, at least 1e-12; 0.0: the smaller of 1e-5 and N^-1.1 for N clients (`record`: N
    rows)."""
    max_epsilon: Amount = 0.0
    """Stop before a round would pass this (`record`: in all runs); 0.0: not set."""
    noise_probe: Flag = True
    """Measure before round 1 what noise alone does to the loss on public rows."""
    on_destructive_noise: Literal["warn", "refuse"] = "refuse"
    """What to do if noise alone raises the loss by more than 0.1: stop before round 1, or
    log a warning."""


@dataclass(frozen=True, config=_SECTION)
class PersonalConfig:
    """What each node trains for itself after the last round, from the released adapter on.

    Nothing of it leaves the node, so it is no part of what `privacy` promises to others.
    """

    epochs: Amount = 0.0
    """Most passes over the client's own rows; 0.0: no personal adapter. Above, a client holds
    an expected tenth of its rows out of all rounds: half of it stops this training, the
    other half chooses between base, shared and personal."""
    learning_rate: PositiveAmount = 0.002
    """Adam's learning rate at the start; it falls by half a cosine."""
    proximal_mu: Amount = 0.0
    """Weight of the pull towards the released adapter."""


@dataclass(frozen=True, config=_SECTION)
class WireConfig:
    """What travels between server and clients."""

    encoding: Encoding = "float32"
    """How adapters travel, both ways: `float32` exactly, 4 bytes a value; `float16`, 2;
    `int8`, 1.02, rounded at random in blocks of 256."""


@dataclass(frozen=True, config=_SECTION)
class OutputConfig:
    """What a run leaves on disk."""

    save_every: Positive = 1
    """Rounds between two saved adapters; the last round is always saved."""
    tracker: Literal["none", "tensorboard", "mlflow", "wandb"] = "none"
    """Where the lines of metrics.jsonl go as well, in the run folder: `mlflow` keeps a
    local folder, `wandb` is offline unless WANDB_MODE is `online`. `pip install` the
    package, or `fedllm[trackers]`."""
    metrics_port: Annotated[int, Strict(), Field(ge=0, le=65_535)] = 0
    """Port of 127.0.0.1 where Prometheus reads the run's numbers while it lasts; 0: none.
    `pip install prometheus-client`, or `fedllm[metrics]`."""


@dataclass(frozen=True, config=_SECTION)
class ResumeConfig:
    """Resuming a run that was interrupted."""

    from_: Text = ""
    """Empty: a new run; `latest`: the newest run folder; or the absolute path of a run
    folder. The run resumes in that folder with the settings of its config.json."""


@dataclass(frozen=True, config=_SECTION)
class RunConfig:
    """Every setting of one run."""

    num_server_rounds: Annotated[int, Strict(), Field(ge=1, le=100_000)] = 1
    """Rounds of federated training."""
    seed: Annotated[int, Strict(), Field(ge=0, lt=2**32)] = 42
    """Seed of everything but privacy's draws."""
    model: ModelConfig = field(default_factory=ModelConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    strategy: StrategyConfig = field(default_factory=StrategyConfig)
    privacy: PrivacyConfig = field(default_factory=PrivacyConfig)
    personal: PersonalConfig = field(default_factory=PersonalConfig)
    wire: WireConfig = field(default_factory=WireConfig)
    output: OutputConfig = field(default_factory=OutputConfig)
    resume: ResumeConfig = field(default_factory=ResumeConfig)

    @property
    def is_personal(self) -> bool:
        """Whether each node trains an adapter of its own after the last round."""
        return self.personal.epochs > 0

    @property
    def cohorts_may_be_empty(self) -> bool:
        """Whether a round without a usable update has trained all the same.

        A round of Poisson sampling may have drawn no client.
        """
        return self.strategy.sampling == "poisson" and self.privacy.unit != "record"

    @property
    def starts_tuned(self) -> bool:
        """Whether round 0 is an adapter that may differ from the base."""
        return bool(self.adapter.start_from or self.data.public_train)

    @property
    def is_joint(self) -> bool:
        """Whether the server noises the sum of all clients' records, once a step."""
        return self.privacy.unit == "record" and self.privacy.noise == "joint"

    @property
    def is_sealed(self) -> bool:
        """Whether the server, which is not trusted, receives encrypted updates alone."""
        is_summed = self.privacy.unit == "client" or self.is_joint
        return is_summed and self.privacy.trust == "trustees"

    @property
    def trustees(self) -> tuple[str, ...]:
        """Names of the trustees, in order; empty unless the run is sealed."""
        return trustee_names(self.privacy.trustees) if self.is_sealed else ()

    @property
    def least_trustees(self) -> int:
        """Fewest trustees of a round."""
        return self.privacy.least_trustees or len(self.trustees)

    @property
    def cohorts_are_secret(self) -> bool:
        """Whether the number of clients in a round must not be shown."""
        return cohorts_are_secret(self.privacy.unit, self.strategy.sampling)


_ADAPTER: TypeAdapter[RunConfig] = TypeAdapter(RunConfig)


def parse_run_config(mapping: Mapping[str, Scalar]) -> RunConfig:
    """Check a flat run config.

    Args:
        mapping: Dotted kebab-case key -> value, as in Flower's `context.run_config`.

    Returns:
        The frozen sections; keys that are missing have their defaults.

    Raises:
        ConfigError: One line a bad key: key, what is allowed, value got.
    """
    nested: dict[str, Any] = {}
    problems: list[str] = []
    for key, value in mapping.items():
        section, _, name = key.rpartition(".")
        if section and not isinstance(nested.setdefault(section, {}), dict):
            problems.append(f"{key}: {section} is not a section")
        else:
            (nested[section] if section else nested)[name] = value
    try:
        config = _ADAPTER.validate_python(nested, by_name=False, by_alias=True)
    except ValidationError as error:
        for detail in error.errors():
            key = ".".join(str(part) for part in detail["loc"])
            got = detail["input"]
            got_text = "" if isinstance(got, dict) else f" (got {got!r})"
            problems.append(f"{key}: {_reason(detail)}{got_text}")
    else:
        problems += _contradictions(config)
    if problems:
        raise ConfigError("\n".join(sorted(problems)))
    if config.train.objective == "dpo":
        # All that reads rows knows `data` alone.
        return replace(config, data=replace(config.data, format="preference"))
    return config


def cohorts_are_secret(unit: object, sampling: object) -> bool:
    """Return whether nothing may be shown of who or how many took part in a round.

    Amplification by Poisson sampling of clients counts on it; at record level the coins
    that count are a client's own.

    Args:
        unit: `privacy.unit`.
        sampling: `strategy.sampling`.
    """
    return unit == "client" and sampling == "poisson"


def trustee_names(text: str) -> tuple[str, ...]:
    """Return the names of a comma-separated list of trustees.

    Raises:
        ValueError: One is not a name, or stands twice.
    """
    names = tuple(part.strip() for part in text.split(",") if part.strip())
    for name in names:
        if not TRUSTEE_NAME.fullmatch(name):
            raise ValueError(
                f"a name has small letters, digits, dots and dashes (got {name!r})"
            )
    if len(set(names)) != len(names):
        raise ValueError(f"a name stands twice (got {text!r})")
    return names


def flat(config: RunConfig) -> dict[str, Scalar]:
    """Return the run config as Flower writes it: dotted kebab-case key -> value."""
    out: dict[str, Scalar] = {}
    for entry in fields(config):
        value = getattr(config, entry.name)
        name = _key(entry.name)
        if hasattr(value, "__dataclass_fields__"):
            for inner in fields(value):
                out[f"{name}.{_key(inner.name)}"] = getattr(value, inner.name)
        else:
            out[name] = value
    return out


def _reason(detail: Any) -> str:
    """Return one pydantic error in plain words."""
    kind = detail["type"]
    if kind in ("unexpected_keyword_argument", "extra_forbidden"):
        return f"unknown key{_similar_key(detail['loc'])}"
    message = str(detail["msg"])
    for old, new in (
        ("Value error, ", ""),
        ("Input should be ", "must be "),
        ("a valid integer", "an integer"),
        ("a valid ", "a "),
        ("greater than or equal to", ">="),
    ):
        message = message.replace(old, new)
    return message


def _similar_key(location: tuple[str | int, ...]) -> str:
    """Return a hint naming the key that was probably meant, or nothing."""
    from difflib import get_close_matches

    typed = ".".join(str(part) for part in location)
    near = get_close_matches(typed, flat(RunConfig()), n=1)
    return f"; did you mean {near[0]}?" if near else ""


def _contradictions(config: RunConfig) -> list[str]:
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
                f"personal.{_key(name)}: is for personal.epochs above 0.0 (got {got}, and "
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
                f"train.{_key(name)}: must be {usual!r} under privacy.noise='joint' (got "
                f"{got!r}): the server takes the step, by strategy.server-optimizer and "
                "strategy.server-learning-rate"
            )
    return problems


def _trust_problems(config: RunConfig) -> list[str]:
    """Return what is wrong with the settings of who is trusted."""
    privacy, usual = config.privacy, PrivacyConfig()
    if privacy.trust == "server":
        return [
            f"privacy.{_key(name)}: is for privacy.trust='trustees' (got "
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
