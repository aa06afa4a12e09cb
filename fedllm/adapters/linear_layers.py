"""The linear layers of a model: those that an adapter may sit on, and why others may not."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fedllm.adapters.kinds.kind import Shape
from fedllm.models.layer_shapes import is_read_past

if TYPE_CHECKING:
    from transformers import PretrainedConfig

OUTPUT_HEAD = "is the output head, which is not adapted; leave it out"
"""Why the head is excluded, as an error about it continues."""

_OF_ANOTHER_TOWER = "is not of the language model, so no answer would train it"
_OF_EXPERTS = (
    "is a name that PEFT takes for the experts of this mixture, whose weights are no linear "
    "layers and are not adapted; leave it out"
)
_READ_PAST = "is a projection whose weight this model reads past an adapter; name in_proj instead"

# What experts' projections were called when each was a layer of its own. PEFT still takes
# these names, of whatever layer, for the experts' joint weights.
_EXPERT_NAMES = {"gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"}


def linear_layers(
    model_config: "PretrainedConfig",
) -> tuple[dict[str, Shape], dict[str, str]]:
    """Return a model's linear layers, from its configuration alone.

    Returns:
        Full name -> (out features, in features) of all; of those that are not adapted full
        name -> why not, as an error continues.
    """
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(model_config, trust_remote_code=False)
    shapes: dict[str, Shape] = {}
    layers: dict[str, Any] = {}
    for name, module in model.named_modules():
        shape = linear_shape(module)
        if shape is not None:
            shapes[name], layers[name] = shape, module
    return shapes, _excluded(model, layers)


def linear_shape(module: Any) -> Shape | None:
    """Return (out features, in features) of a linear layer; None for any other module.

    GPT-2's `Conv1D` is a linear layer with its weight the other way round.
    """
    from torch.nn import Linear
    from transformers.pytorch_utils import Conv1D

    if isinstance(module, Conv1D):
        inward, outward = module.weight.shape
        return int(outward), int(inward)
    if isinstance(module, Linear):
        return module.out_features, module.in_features
    return None


def _excluded(model: Any, layers: Mapping[str, Any]) -> dict[str, str]:
    """Return which linear layers are not adapted, and why."""
    head = model.get_output_embeddings()
    config = model.config
    language = model if config.get_text_config() is config else model.get_decoder()
    inside = set(language.modules())
    has_experts = any(map(_holds_experts, inside))
    excluded = {}
    for name, module in layers.items():
        parent, _, last = name.rpartition(".")
        if module is head:
            excluded[name] = OUTPUT_HEAD
        elif module not in inside:
            excluded[name] = _OF_ANOTHER_TOWER
        elif has_experts and last in _EXPERT_NAMES:
            excluded[name] = _OF_EXPERTS
        elif is_read_past(model.get_submodule(parent), last):
            excluded[name] = _READ_PAST
    return excluded


def _holds_experts(module: Any) -> bool:
    """Return whether a module holds the joint weights of experts: a matrix for each."""
    return any(
        parameter.dim() == 3 and name != "weight"
        for name, parameter in module.named_parameters(recurse=False)
    )
