"""Small random models with the parts of real ones."""

import io
import json
import os
import shutil
from pathlib import Path

import pytest

_BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")

CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>\n"
    "{{ message['content'] }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)

SENTENCES = [
    "What is meant by the term asthma? A disorder of the lungs with wheezing.",
    "Define anaemia. A deficiency of red blood cells in the blood.",
    "What does the medical word fracture mean? The breaking of a hard tissue or bone.",
    "What is a vaccine? A preparation injected to produce or increase immunity.",
    "Explain the term arthritis. An inflammation of a joint or of several joints.",
    "Which part of the body is the femur? The longest and thickest bone of the leg.",
    "What is an antibiotic? A substance that kills bacteria and cures infections.",
    "Define tumour. An abnormal mass of tissue that serves no useful purpose.",
    "What does a cardiologist do? A physician skilled in the care of the heart.",
    "What is an allergy? A hypersensitivity of the body to a substance it meets.",
]


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random 2-layer Llama with a sentencepiece tokenizer and no chat template.

    Its files are those that OpenLLaMA has, and no more.
    """
    folder = tmp_path_factory.mktemp("tiny-llama")
    save_llama(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_chat_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `tiny_llama`, with a chat template."""
    folder = tmp_path_factory.mktemp("tiny-chat-llama")
    save_llama(folder)
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    return folder


@pytest.fixture(scope="module")
def browser():
    """A headless Chromium that is already there; FEDLLM_CHROMIUM may name it."""
    found = [os.environ.get("FEDLLM_CHROMIUM"), *map(shutil.which, _BROWSERS)]
    program = next((path for path in found if path), None)
    if program is None:
        pytest.skip("no Chromium on this machine; FEDLLM_CHROMIUM may name one")
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as driver:
        # As root, in a container, its sandbox cannot be made.
        options = ["--no-sandbox"] if os.geteuid() == 0 else []
        chromium = driver.chromium.launch(executable_path=program, args=options)
        yield chromium
        chromium.close()


def save_llama(folder: Path) -> None:
    import torch
    from sentencepiece import SentencePieceTrainer
    from transformers import LlamaConfig, LlamaForCausalLM

    pieces = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES),
        model_writer=pieces,
        vocab_size=384,
        model_type="bpe",
        byte_fallback=True,
        minloglevel=2,
    )
    (folder / "tokenizer.model").write_bytes(pieces.getvalue())
    tokenizer_config = {
        "tokenizer_class": "LlamaTokenizer",
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "pad_token": None,
        "model_max_length": 2048,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    config = LlamaConfig(
        vocab_size=384,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
