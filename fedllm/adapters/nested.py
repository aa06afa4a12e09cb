"""Nested ranks: a node trains the first columns of each trained factor, and holds the rest.

With a fixed A the adapter is linear in B, so B's first columns are the adapter of a smaller
rank, and a mean over clients of unlike ranks is exact: a column that a client does not train
is in its update as zero. The whole B stays in the forward pass.
"""

from typing import TYPE_CHECKING, Any

from fedllm.adapters.peft_model import trained_parameters
from fedllm.adapters.spec import AdapterSpec

if TYPE_CHECKING:
    import torch
    from peft import PeftModel


def train_first_columns(
    model: "PeftModel", spec: AdapterSpec, rank: int
) -> "dict[str, torch.Tensor]":
    """Make the first columns of every trained factor all that is trained.

    Gradients, the optimiser's moments and the gradients of single examples then have the size
    of the smaller rank.

    Args:
        model: The base model with the adapter attached, of a kind with nested ranks.
        spec: The adapter.
        rank: How many columns are trained, at least 1 and below the adapter's.

    Returns:
        Name that travels -> the columns that are held, (out, adapter's rank - rank).
    """
    from torch.nn.utils import parametrize

    owners = {
        id(parameter): (module, name)
        for module in model.modules()
        for name, parameter in module.named_parameters(recurse=False)
    }
    rest = {}
    for name, parameter in trained_parameters(model, spec).items():
        owner, attribute = owners[id(parameter)]
        first_columns = _first_columns(parameter, rank)
        parametrize.register_parametrization(owner, attribute, first_columns)
        rest[name] = first_columns.rest
    return rest


def _first_columns(weight: "torch.Tensor", rank: int) -> Any:
    """Return the parametrisation weight = [trained | rest]."""
    import torch

    class FirstColumns(torch.nn.Module):
        rest: torch.Tensor

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("rest", weight[:, rank:].detach().clone())

        def forward(self, trained: torch.Tensor) -> torch.Tensor:
            return torch.cat([trained, self.rest], dim=1)

        def right_inverse(self, whole: torch.Tensor) -> torch.Tensor:
            return whole[:, :rank].detach().clone()

    return FirstColumns()
