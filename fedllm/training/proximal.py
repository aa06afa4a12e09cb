"""FedProx: a trainer's pull towards the round's adapter (Li et al. 2020, arXiv 1812.06127)."""

from typing import Any

import torch


class Proximal:
    """A trainer whose loss may pull towards where it started."""

    def __init__(self, *args: Any, proximal_mu: float, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._proximal_mu = proximal_mu
        self._pairs: list[tuple[torch.Tensor, torch.Tensor]] = []

    def remember_reference(self, trained: list[torch.nn.Parameter]) -> None:
        """Record the present trained values, to which FedProx pulls."""
        if self._proximal_mu > 0:
            self._pairs = [(p, p.detach().clone()) for p in trained]

    def pull(self) -> torch.Tensor | float:
        """Return mu / 2 times the squared distance from there; 0 without FedProx."""
        if not self._pairs:
            return 0.0
        distances = [((p - start) ** 2).sum() for p, start in self._pairs]
        return self._proximal_mu / 2 * torch.stack(distances).sum()
