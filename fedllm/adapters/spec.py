"""The declaration of an adapter for one base model: names and shapes of what travels."""

import zlib
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Arrays = dict[str, npt.NDArray[np.float32]]

PREFIX = "base_model.model."
"""PEFT's prefix of a module's name."""


@dataclass(frozen=True)
class AdapterSpec:
    """One adapter, fully resolved for one base model.

    Attributes:
        kind: A name in `fedllm.adapters.kinds.KINDS`.
        rank: Rank r; without meaning for `ia3`.
        alpha: The update is scaled by alpha / rank; LoRA's kinds only.
        dropout: Dropout on the adapter's input while training; not for `ia3`.
        target_modules: The adapted modules under the names that PEFT gets: the last parts
            if those mean no other module, else whole names.
        modules: Full module name -> (out features, in features), sorted by name.
        seed: Public seed of the fixed factors and of the first A of `lora`.
        feedforward: Those of target_modules whose input `ia3` rescales, not the output.
    """

    kind: str
    rank: int
    alpha: float
    dropout: float
    target_modules: tuple[str, ...]
    modules: Mapping[str, tuple[int, int]]
    seed: int
    feedforward: tuple[str, ...] = ()

    @property
    def trained_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return name -> shape of every array that is trained and travels."""
        return {
            f"{PREFIX}{module}.{side}": shape
            for module in self.modules
            for side, shape in self.trained_tensors(module).items()
        }

    @property
    def num_trainable(self) -> int:
        """Return d, the number of trained values."""
        return sum(int(np.prod(shape)) for shape in self.trained_shapes.values())

    def rescales_input(self, module: str) -> bool:
        """Return whether `ia3` rescales what goes into a module, not what comes out."""
        return any(module.endswith(name) for name in self.feedforward)

    def trained_tensors(self, module: str) -> dict[str, tuple[int, ...]]:
        """Return last part of the name -> shape of each trained array of a module."""
        # Here, since every kind imports this module.
        from fedllm.adapters.kinds import kind_of

        return kind_of(self.kind).trained_tensors(self, module)


def generator_of(seed: int, name: str) -> np.random.Generator:
    """Return a generator that is the same in every process for a seed and a name."""
    return np.random.default_rng([seed, zlib.crc32(name.encode())])
