"""A run's base model with its adapter: the one place that loads and joins them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedllm.adapters.nested import train_first_columns
from fedllm.adapters.peft_model import (
    attach,
    get_trained,
    set_trained,
    trained_parameters,
)
from fedllm.adapters.resolve import adapter_spec
from fedllm.adapters.spec import AdapterSpec, Arrays
from fedllm.models.loading import load_base, load_tokenizer
from fedllm.models.location import load_config, locate

if TYPE_CHECKING:
    import torch
    from peft import PeftModel

    from fedllm.config import RunConfig


@dataclass(frozen=True, eq=False)
class AdaptedModel:
    """A frozen base model with one adapter on it.

    Attributes:
        model: The base with the adapter attached; only the trained values need grad.
        tokenizer: The base model's tokenizer.
        spec: The adapter.
        rest: Name -> the columns of a trained factor that this node holds and does not
            train; empty if it trains the whole rank.
    """

    model: "PeftModel"
    tokenizer: Any
    spec: AdapterSpec
    rest: "Mapping[str, torch.Tensor]" = field(default_factory=dict, kw_only=True)

    @property
    def pad_token_id(self) -> int:
        """Return the id that fills short rows; the attention mask marks padding."""
        return int(self.tokenizer.pad_token_id or 0)

    def set(self, arrays: Mapping[str, Any]) -> None:
        """Copy trained values into the model.

        Raises:
            AdapterError: A name is missing or foreign, or a shape differs.
        """
        set_trained(self.model, self.spec, arrays, self.rest)

    def get(self) -> Arrays:
        """Copy the values that travel out of the model, those that it holds included."""
        return get_trained(self.model, self.spec, self.rest)

    def parameters(self) -> "dict[str, torch.nn.Parameter]":
        """Return the trained parameters under the names that travel."""
        return trained_parameters(self.model, self.spec)


def load_adapted_model(
    config: "RunConfig",
    home: Path,
    device: str | None = None,
    rank: int | None = None,
) -> AdaptedModel:
    """Load a run's base model and attach a fresh adapter, which leaves it unchanged.

    Args:
        config: The run config, with an adapter kind that is not `auto`.
        home: The program's folder, where models are cached.
        device: As in `load_base`.
        rank: How many columns of each factor are trained, below the adapter's rank, of a
            kind with nested ranks; None: all.

    Raises:
        AdapterError: The adapter does not fit the model.
        ModelError: The base model cannot be found or loaded.
    """
    location = locate(config.model.name, home)
    # Before the weights, so that an adapter that does not fit is reported in a second.
    spec = adapter_spec(config.adapter, load_config(location), config.seed)
    base = load_base(
        location,
        config.model.quantization,
        home,
        device,
        quantize_embeddings=config.model.quantize_embeddings,
    )
    model = attach(base, spec)
    rest = {} if rank is None else train_first_columns(model, spec, rank)
    return AdaptedModel(model, load_tokenizer(location), spec, rest=rest)
