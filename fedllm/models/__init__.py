"""The frozen base model: find it, quantise and cache it, load it, compute it cheaply.

Enters: `model.name`, the bits, a device. Leaves: a base model in eval mode and its
tokenizer. `loading` finds and loads; `builtin` fetches the built-in model; `quantization`
and `quantized_embeddings` know bitsandbytes; `attention`, `packing` and `answer_loss` make a
step cheap on a CPU, where `fast_paths` finds them right; `known` and `layer_shapes` answer
without a model. Must not import Flower; bitsandbytes is imported here and in
training.activation_compression alone.
"""

from fedllm.models.loading import load_base, load_tokenizer
from fedllm.models.location import locate

__all__ = ["load_base", "load_tokenizer", "locate"]
