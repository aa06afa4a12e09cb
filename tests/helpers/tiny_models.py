"""Sentences and a template for small random models with the parts of real ones."""

import io
import json
from pathlib import Path

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
