"""The run config: what `[tool.flwr.app.config]` and `--run-config` may say.

Flower hands the apps a flat mapping of dotted kebab-case keys to bool, int, float or
str. `fedllm.config_parsing` turns it into the frozen sections that stand here, and
`fedllm.config_rules` knows which values do not go together. The defaults here and those of
pyproject.toml are the same; a test walks both.

Keys that change what privacy is promised are all in `PrivacyConfig`, together with
`strategy.sampling`, `strategy.fraction-train` and `num-server-rounds`.
"""

import os
import re
from dataclasses import field, fields
from pathlib import Path
from typing import Annotated, Literal

from pydantic import (
    AfterValidator,
    ConfigDict,
    Field,
    Strict,
)
from pydantic.dataclasses import dataclass

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
    alias_generator=lambda name: key_of(name),
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


def key_of(name: str) -> str:
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
        name = key_of(entry.name)
        if hasattr(value, "__dataclass_fields__"):
            for inner in fields(value):
                out[f"{name}.{key_of(inner.name)}"] = getattr(value, inner.name)
        else:
            out[name] = value
    return out
