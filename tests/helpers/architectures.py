"""Small random models of every architecture that is tried, as transformers makes them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

VOCABULARY = 96
_SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_NARROW_HEAD = {**_SMALL, "head_dim": 16}
_OLD = {**_SMALL, "num_key_value_heads": 2}
_GPT = {
    "vocab_size": VOCABULARY,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 2,
    "n_positions": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# A random mask is drawn anew in each pass, so that no two gradients could be compared.
_NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}


@dataclass(frozen=True)
class Architecture:
    """One architecture and the settings of a small model of it.

    Attributes:
        name: As people call it.
        model_type: As in a model's config.json.
        settings: Of its configuration.
    """

    name: str
    model_type: str
    settings: Mapping[str, Any] = field(default_factory=dict)

    def config(self) -> Any:
        """Return the configuration of a small model."""
        from transformers import AutoConfig

        return AutoConfig.for_model(self.model_type, **self.settings)

    def model(self, seed: int = 1) -> Any:
        """Return a small random model in float32, in eval mode."""
        import torch
        from transformers import AutoModelForCausalLM

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = AutoModelForCausalLM.from_config(self.config(), dtype=torch.float32)
            # As made, all scores are near zero and every loss near log(vocabulary): a head
            # that was wrong by a factor would hardly show.
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.dim() == 2:
                        parameter.mul_(4)
        return model.eval()


ARCHITECTURES = [
    Architecture("Llama", "llama", _SMALL),
    Architecture("Qwen 2", "qwen2", _SMALL),
    Architecture("Qwen 3", "qwen3", _NARROW_HEAD),
    Architecture(
        "Qwen 3 MoE",
        "qwen3_moe",
        {
            **_NARROW_HEAD,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
        },
    ),
    Architecture("Mistral", "mistral", {**_NARROW_HEAD, "sliding_window": None}),
    Architecture("Mistral, window", "mistral", {**_NARROW_HEAD, "sliding_window": 8}),
    Architecture(
        "Mixtral", "mixtral", {**_NARROW_HEAD, **_EXPERTS, "sliding_window": None}
    ),
    Architecture("Gemma", "gemma", _NARROW_HEAD),
    Architecture(
        "Gemma 2",
        "gemma2",
        {**_NARROW_HEAD, "sliding_window": 8, "query_pre_attn_scalar": 16},
    ),
    Architecture(
        "Gemma 3",
        "gemma3_text",
        {**_NARROW_HEAD, "sliding_window": 8, "query_pre_attn_scalar": 16},
    ),
    Architecture(
        "Gemma 3, vision",
        "gemma3",
        {
            "text_config": {
                **_NARROW_HEAD,
                "sliding_window": 8,
                "query_pre_attn_scalar": 16,
            },
            "vision_config": {
                "hidden_size": 32,
                "intermediate_size": 32,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "image_size": 32,
                "patch_size": 8,
            },
            "mm_tokens_per_image": 4,
            "image_token_index": 5,
            "image_token_id": 5,
            "boi_token_index": 6,
            "eoi_token_index": 7,
        },
    ),
    Architecture("Phi-3", "phi3", {**_SMALL, "original_max_position_embeddings": 64}),
    Architecture(
        "GPT-2",
        "gpt2",
        {**_GPT, **_NO_DROPOUT},
    ),
    Architecture("GPT-NeoX", "gpt_neox", _OLD),
    Architecture(
        "GPT-J",
        "gptj",
        {**_GPT, "rotary_dim": 8},
    ),
    Architecture(
        "OPT", "opt", {**_OLD, "ffn_dim": 32, "word_embed_proj_dim": 32, "dropout": 0.0}
    ),
    Architecture(
        "Bloom",
        "bloom",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "n_layer": 2,
            "n_head": 2,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
        },
    ),
    Architecture(
        "Falcon",
        "falcon",
        {**_OLD, "new_decoder_architecture": False, "multi_query": True},
    ),
    Architecture(
        "MPT",
        "mpt",
        {
            "vocab_size": VOCABULARY,
            "d_model": 32,
            "n_heads": 2,
            "n_layers": 2,
            "max_seq_len": 64,
        },
    ),
    Architecture("Cohere", "cohere", _SMALL),
    Architecture("Cohere 2", "cohere2", {**_NARROW_HEAD, "sliding_window": 8}),
    Architecture(
        "Granite",
        "granite",
        {
            **_SMALL,
            "logits_scaling": 8.0,
            "residual_multiplier": 0.22,
            "embedding_multiplier": 12.0,
        },
    ),
    Architecture("OLMo 2", "olmo2", _SMALL),
    Architecture("StableLM", "stablelm", _SMALL),
    Architecture("StarCoder 2", "starcoder2", _SMALL),
    Architecture("SmolLM3", "smollm3", _SMALL),
    Architecture(
        "DeepSeek V3",
        "deepseek_v3",
        {
            **_OLD,
            "moe_intermediate_size": 32,
            "n_routed_experts": 4,
            "n_shared_experts": 1,
            "num_experts_per_tok": 2,
            "n_group": 2,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_nope_head_dim": 16,
            "qk_rope_head_dim": 8,
            "v_head_dim": 16,
        },
    ),
    Architecture(
        "GPT-OSS",
        "gpt_oss",
        {
            **_NARROW_HEAD,
            **_EXPERTS,
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    Architecture(
        "Falcon-H1",
        "falcon_h1",
        {
            **_NARROW_HEAD,
            "mamba_d_ssm": 32,
            "mamba_n_heads": 2,
            "mamba_d_head": 16,
            "mamba_d_state": 8,
            "mamba_n_groups": 1,
            "mamba_chunk_size": 8,
        },
    ),
    Architecture(
        "Mamba",
        "mamba",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "state_size": 4,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
]
