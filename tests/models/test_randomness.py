"""Models that draw at random, or remember, are rejected under record level."""

import pytest
import torch
from transformers import (
    Gemma3Config,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

from fedllm.errors import ConfigError
from fedllm.models.randomness import require_no_randomness

SMALL = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 1}
LLAMA = {**SMALL, "intermediate_size": 16, "num_attention_heads": 2}
GPT2 = {"vocab_size": 32, "n_embd": 16, "n_layer": 1, "n_head": 2}
OPT = {**SMALL, "ffn_dim": 16, "num_attention_heads": 2, "word_embed_proj_dim": 16}
MIXTRAL = {**LLAMA, "num_local_experts": 2, "num_key_value_heads": 2}
NO_GPT2 = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}


def llama(**more):
    return LlamaForCausalLM(LlamaConfig(**LLAMA, **more))


def gpt2(**more):
    return GPT2LMHeadModel(GPT2Config(**GPT2, **more))


def opt(**more):
    return OPTForCausalLM(OPTConfig(**OPT, **more))


def mixtral(**more):
    return MixtralForCausalLM(MixtralConfig(**MIXTRAL, **more))


@pytest.mark.parametrize(
    ("make", "settings", "named"),
    [
        (gpt2, {}, "resid_pdrop"),
        (gpt2, {**NO_GPT2, "embd_pdrop": 0.1}, "embd_pdrop"),
        (opt, {"dropout": 0.1}, "dropout=0.1"),
        (opt, {"dropout": 0.0, "layerdrop": 0.1}, "layerdrop"),
        (opt, {"dropout": 0.0, "attention_dropout": 0.1}, "attention_dropout"),
        (llama, {"attention_dropout": 0.1}, "attention_dropout"),
        (mixtral, {"router_jitter_noise": 0.1}, "router_jitter_noise"),
        (llama, {"rope_scaling": DYNAMIC}, "'dynamic'"),
    ],
)
def test_what_is_random_or_remembers_is_named(make, settings, named):
    with pytest.raises(ConfigError, match=named):
        require_no_randomness(make(**settings))


@pytest.mark.parametrize(
    ("make", "settings"),
    [(gpt2, NO_GPT2), (opt, {"dropout": 0.0}), (llama, {}), (mixtral, {})],
)
def test_models_without_dropout_pass(make, settings):
    require_no_randomness(make(**settings))


def test_a_configuration_within_a_configuration_is_looked_into():
    model = torch.nn.Linear(1, 1)
    model.config = Gemma3Config(text_config={"attention_dropout": 0.1})

    with pytest.raises(ConfigError, match="attention_dropout=0.1"):
        require_no_randomness(model)


def test_dropout_that_only_a_module_has_is_found():
    model = llama()
    model.model.layers[0].mlp.extra = torch.nn.Dropout(0.2)

    with pytest.raises(ConfigError, match=r"Dropout\(0.2\)"):
        require_no_randomness(model)
