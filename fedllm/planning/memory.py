"""The memory that one client needs, from the model's configuration alone."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from fedllm.adapters.linear_layers import linear_shape
from fedllm.adapters.resolve import adapter_spec
from fedllm.config import RunConfig
from fedllm.models.loading import compute_dtype
from fedllm.planning.adapter_choice import choose_adapter, with_choice

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# A value in NF4 with its share of doubly quantised scales, in bytes: 4.127 bits
# (Dettmers et al. 2023, QLoRA, arXiv 2305.14314).
_NF4_BYTES = 4.127 / 8
# The same with a float32 scale for 64 values, the most that the embeddings have.
_NF4_PLAIN_BYTES = 4.5 / 8
# A compressed activation, or the head's value, with its share of a float32 scale for 256.
_COMPRESSED_BYTES = 1 + 4 / 256

PROCESS_BYTES = 0.6e9
"""What a process takes on the CPU that has imported torch, transformers, peft and trl."""


@dataclass(frozen=True)
class MemoryNeed:
    """The bytes that training on one client takes.

    Attributes:
        base: The base model in its quantisation.
        adapter: Trained values, their gradient and, for AdamW, two moments.
        activations: The values that a micro-batch of the longest rows keeps for the backward
            pass, an upper bound: ordinary rows are shorter.
    """

    base: float
    adapter: float
    activations: float


def memory_need(
    config: RunConfig, model_config: "PretrainedConfig", device: str
) -> MemoryNeed:
    """Return the memory that one client needs.

    Args:
        config: The run config.
        model_config: The base model's configuration.
        device: "cuda" or "cpu", which decides the type of the computation.

    Raises:
        AdapterError: The adapter does not fit the model.
    """
    import torch
    from transformers import AutoModelForCausalLM

    if config.adapter.kind == "auto":
        clients = config.strategy.num_clients or 20
        config = with_choice(config, choose_adapter(config, clients))
    # On the meta device a model has shapes and no values.
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(model_config)
    head = model.get_output_embeddings()
    linear = sum(
        module.weight.numel()
        for module in model.modules()
        if linear_shape(module) is not None and module is not head
    )
    other = sum(parameter.numel() for parameter in model.parameters()) - linear
    wide = compute_dtype(device).itemsize
    small = 0.0
    if config.model.quantize_embeddings and not model_config.tie_word_embeddings:
        table, matrix = model.get_input_embeddings().weight, head.weight
        other -= table.numel() + matrix.numel()
        small = table.numel() * _NF4_PLAIN_BYTES + matrix.numel() * _COMPRESSED_BYTES
    narrow = {0: float(wide), 4: _NF4_BYTES, 8: 1.0}[config.model.quantization]
    trained = adapter_spec(config.adapter, model_config, config.seed).num_trainable
    copies = 4 if config.train.optimizer == "adamw" else 2
    return MemoryNeed(
        base=linear * narrow + other * wide + small,
        adapter=trained * 4.0 * copies,
        activations=_activations(config, model_config, wide)
        + _example_gradients(config, trained),
    )


def _example_gradients(config: RunConfig, trained: int) -> float:
    """Return the bytes of the gradients of single examples, which record level clips.

    They are made on the device and copied to the CPU.
    """
    if config.privacy.unit != "record":
        return 0.0
    return 2.0 * 4 * config.train.batch_size * trained


def _activations(
    config: RunConfig, model_config: "PretrainedConfig", wide: int
) -> float:
    """Return the bytes that a micro-batch keeps, for layers of Llama's kind.

    A layer keeps about 8 values of the hidden size and 4 of the inner size for each
    token; with checkpointing only its input, and one layer is computed again at a time.
    """
    text = model_config.get_text_config()
    hidden: int = text.hidden_size
    inner: int = getattr(text, "intermediate_size", None) or 4 * hidden
    layers: int = text.num_hidden_layers
    vocabulary: int = text.vocab_size
    tokens = config.train.batch_size * config.train.max_length
    if config.train.objective == "dpo":
        # Two answers of each row; the reference keeps nothing.
        tokens *= 2
    layer = 8 * hidden + 4 * inner
    kept, bytes_each = layers * layer, float(wide)
    if config.train.gradient_checkpointing:
        kept = layers * hidden + layer
    if config.train.activation_compression:
        bytes_each = _COMPRESSED_BYTES
    # The head's scores and their gradient, in float32.
    return tokens * (kept * bytes_each + vocabulary * 8)
