"""Models known by name: the built-in one, and one that can be planned for unseen."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class KnownModel:
    """A base model that can be named, planned for and credited without being loaded.

    Attributes:
        name: What `model.name` takes.
        hub_name: Its name on the Hugging Face hub.
        licence: The licence's tag on the hub.
        numbers: Entries of its config.json that give its layers (a test compares).
    """

    name: str
    hub_name: str
    licence: str
    numbers: Mapping[str, Any]


BUILT_IN_MODEL = KnownModel(
    name="smollm2-135m-instruct",
    hub_name="HuggingFaceTB/SmolLM2-135M-Instruct",
    licence="apache-2.0",
    numbers={
        "model_type": "llama",
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "num_hidden_layers": 30,
        "vocab_size": 49152,
        "tie_word_embeddings": True,
    },
)

_OPEN_LLAMA_3B = KnownModel(
    name="openlm-research/open_llama_3b_v2",
    hub_name="openlm-research/open_llama_3b_v2",
    licence="apache-2.0",
    numbers={
        "model_type": "llama",
        "hidden_size": 3200,
        "intermediate_size": 8640,
        "num_attention_heads": 32,
        "num_hidden_layers": 26,
        "vocab_size": 32000,
    },
)

KNOWN_MODELS: Mapping[str, KnownModel] = {
    model.name: model for model in (BUILT_IN_MODEL, _OPEN_LLAMA_3B)
}
