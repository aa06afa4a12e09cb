"""Clients with a small model."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM

from fedllm.adapters.peft_model import attach
from fedllm.adapters.resolve import adapter_spec
from fedllm.config import AdapterConfig, DataConfig
from fedllm.data.tokens import tokenize
from fedllm.models.loading import load_tokenizer
from fedllm.models.location import load_config
from tests.helpers.clients import Client, Make, rows


@pytest.fixture(scope="module")
def make_client(tiny_chat_llama: Path) -> Make:
    def make(kind: str = "ffa-lora", base: Any = None, **adapter: Any) -> Client:
        if base is None:
            base = AutoModelForCausalLM.from_pretrained(
                tiny_chat_llama, dtype=torch.float32
            )
            base.config.use_cache = False
            base.requires_grad_(False)
        config = AdapterConfig(kind=kind, rank=4, **adapter)
        spec = adapter_spec(config, load_config(str(tiny_chat_llama)), 5)
        tokenizer = load_tokenizer(str(tiny_chat_llama))
        tokenized = tokenize(Dataset.from_list(rows()), tokenizer, DataConfig(), 512)
        model = attach(base, spec).eval()
        return Client(model, tokenizer, spec, tokenized.examples)

    return make
