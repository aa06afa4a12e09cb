"""What every kind of adapter declares and does."""

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy.typing as npt

from fedllm.adapters.spec import AdapterSpec, Arrays

if TYPE_CHECKING:
    import torch
    from peft import PeftConfig, PeftModel

Shape = tuple[int, int]
"""(out features, in features) of a linear layer."""

Targets = tuple[Sequence[str], Sequence[str]]
"""Last parts of the target modules' names, and of those whose input is rescaled."""


class Kind(Protocol):
    """A kind of adapter: all that the rest of the package asks of it.

    Attributes:
        peft_method: PEFT's method, as its paper spells it; in small letters the tag that
            the Hugging Face hub knows it by.
        has_rank: Whether `adapter.rank` has a meaning.
        has_dropout: Whether `adapter.dropout` may be above 0.
        is_mean_exact: Whether the mean of clients' trained values is the adapter of their
            mean update.
        why_not_nested: Why a node cannot train a smaller rank than the run's; empty: it can,
            by the first columns of each trained array.
        file_shapes: Last part of a weight's name in PEFT's file -> the shapes that it may
            have, in the words "r", "in", "out" and "1".
    """

    peft_method: str
    has_rank: bool
    has_dropout: bool
    is_mean_exact: bool
    why_not_nested: str
    file_shapes: Mapping[str, Sequence[tuple[str, ...]]]

    def default_modules(self, model_type: str) -> Sequence[Targets]:
        """Return what `adapter.target-modules="auto"` means for an architecture.

        Args:
            model_type: As in a model's config.json.

        Returns:
            Choices, of which the first counts whose modules the model has: PEFT's own for
            this architecture, then those by the names that such layers have elsewhere.
        """

    def max_rank(self, shapes: Iterable[Shape]) -> int | None:
        """Return the largest rank that target modules allow; None: any rank."""

    def trained_tensors(
        self, spec: AdapterSpec, module: str
    ) -> dict[str, tuple[int, ...]]:
        """Return last part of the name -> shape of each trained array of a module."""

    def initial_arrays(self, spec: AdapterSpec) -> Arrays:
        """Return the trained values of an adapter that leaves the base unchanged."""

    def peft_arrays(
        self, spec: AdapterSpec, trained: Mapping[str, npt.NDArray[Any]]
    ) -> Arrays:
        """Return all that PEFT needs under PEFT's names, fixed factors included."""

    def trained_arrays(
        self, spec: AdapterSpec, arrays: Mapping[str, npt.NDArray[Any]]
    ) -> Arrays:
        """Return the trained values of what `peft_arrays` returned, or a KeyError.

        Fixed factors are not looked at: the caller compares.
        """

    def peft_config(
        self, spec: AdapterSpec, base_name: str | None = None
    ) -> "PeftConfig":
        """Return PEFT's configuration of this adapter."""

    def freeze_factors(self, model: "PeftModel", spec: AdapterSpec) -> None:
        """Write what is fixed into a model that PEFT has just wrapped."""

    def parameter(self, layer: Any, side: str) -> "torch.nn.Parameter":
        """Return the parameter of an adapted layer that travels as `side`."""
