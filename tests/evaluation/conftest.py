"""A small chat model and its tokenizer, and the settings of a run."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from fedllm.models.loading import load_tokenizer
from tests.helpers.federations import settings

__all__ = ["settings"]


@pytest.fixture(scope="module")
def model(tiny_chat_llama: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_chat_llama, dtype=torch.float32)


@pytest.fixture(scope="module")
def tokenizer(tiny_chat_llama: Path) -> Any:
    return load_tokenizer(str(tiny_chat_llama))
