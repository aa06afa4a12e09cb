"""What the trainers of all objectives share: one device, and FedProx's pull.

FedProx pulls towards the round's adapter (Li et al. 2020, arXiv 1812.06127).
"""

from typing import Any

import torch


class ClientTrainer:
    """A part of a trainer of TRL's: it stands before that among the bases."""

    def __init__(
        self, *others: Any, args: Any, proximal_mu: float, **kwargs: Any
    ) -> None:
        # With several GPUs a step would take that many batches, one on each: a client uses
        # one.
        args._n_gpu = min(args.n_gpu, 1)
        super().__init__(*others, args=args, **kwargs)  # type: ignore[call-arg]
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
