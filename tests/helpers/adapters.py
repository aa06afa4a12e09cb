"""Adapters of every kind on a small model."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from fedllm.adapters.resolve import adapter_spec
from fedllm.adapters.spec import AdapterSpec
from fedllm.config import AdapterConfig, RunConfig
from fedllm.config_parsing import parse_run_config
from fedllm.models import loading
from fedllm.models.location import load_config


def make_config(**more: object) -> RunConfig:
    return parse_run_config(
        {
            "adapter.kind": "auto",
            "num-server-rounds": 4,
            "train.local-steps": 1,
            **more,
        }
    )


KINDS = ["ffa-lora", "lora-core", "lora", "ia3", "vera"]
IDS = torch.arange(3, 35).reshape(2, 16)
Q = "base_model.model.model.layers.0.self_attn.q_proj"
K = "base_model.model.model.layers.0.self_attn.k_proj"
V = "base_model.model.model.layers.0.self_attn.v_proj"
DOWN = "base_model.model.model.layers.0.mlp.down_proj"


def make_spec(folder: Path, kind: str = "ffa-lora", seed: int = 5, **more: Any) -> Any:
    config = AdapterConfig(kind=kind, rank=more.pop("rank", 4), **more)
    return adapter_spec(config, load_config(str(folder)), seed)


def load_base(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def load_quantised(folder: Path, home: Path, bits: int) -> Any:
    return loading.load_base(str(folder), bits, home, "cpu")


def load_4_bit_float32(folder: Path) -> Any:
    bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, quantization_config=bits, device_map="cpu"
    )
    return model.eval()


def random_arrays(spec: AdapterSpec, seed: int = 0) -> dict[str, Any]:
    draw = np.random.default_rng(seed)
    return {
        name: draw.normal(0, 0.3, shape).astype(np.float32)
        for name, shape in spec.trained_shapes.items()
    }


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = model(input_ids=IDS).logits
    return out
