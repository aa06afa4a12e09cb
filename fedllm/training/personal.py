"""A client's personal adapter: trained on from the released one, on its own rows alone.

The row that a client would gain from staying at home is among the candidates: what its
held-out rows like best of base, shared and personal is its choice. Adam on these rows has no
noise, so the personal adapter is not private, and is for the client's own machine.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedllm.adapters.adapted_model import AdaptedModel
from fedllm.adapters.peft_model import initial_arrays
from fedllm.adapters.spec import Arrays
from fedllm.config import RunConfig
from fedllm.training.own_best import (
    OwnBest,
    OwnBestConfig,
    OwnRows,
    train_to_own_best,
)

BASE, SHARED, PERSONAL = "base", "shared", "personal"
CANDIDATES = (BASE, SHARED, PERSONAL)
"""What a client's held-out rows choose between; of two that are equal the first."""


@dataclass(frozen=True)
class PersonalRows:
    """What a personal adapter is made from, each with `input_ids` and `labels`.

    Attributes:
        training: The rows that also train in the rounds.
        stopping: End the training.
        choosing: Choose between the candidates; they play no part in the training.
    """

    training: Sequence[Mapping[str, Any]]
    stopping: Sequence[Mapping[str, Any]]
    choosing: Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Personal:
    """A personal adapter and what speaks for it.

    Attributes:
        search: The training's result; its values are the shared ones if no step was better.
        losses: Each of CANDIDATES -> loss on the rows that choose.
        choice: The candidate with the lowest loss.
        arrays: The trained values of the choice.
    """

    search: OwnBest
    losses: dict[str, float]
    choice: str
    arrays: Arrays


def train_personal(
    adapted: AdaptedModel,
    rows: PersonalRows,
    shared: Arrays,
    config: RunConfig,
    score: Callable[[Sequence[Mapping[str, Any]]], float],
) -> Personal:
    """Train on from the released adapter, and choose by rows that no training has seen.

    Args:
        adapted: The resident model; its trained values are overwritten.
        rows: The client's rows.
        shared: The released adapter.
        config: The run config, with `personal.epochs` above 0.
        score: Returns the loss of the resident model on rows, in nats per answer token.
    """
    personal = config.personal
    search = train_to_own_best(
        adapted,
        OwnRows(rows.training, rows.stopping),
        shared,
        config.train,
        OwnBestConfig(
            (personal.learning_rate,),
            personal.epochs,
            config.seed,
            personal.proximal_mu,
        ),
        score,
    )
    arrays = {
        BASE: initial_arrays(adapted.spec),
        SHARED: shared,
        PERSONAL: search.arrays,
    }
    losses = {}
    for name in CANDIDATES:
        adapted.set(arrays[name])
        losses[name] = score(rows.choosing)
    choice = min(CANDIDATES, key=lambda name: losses[name])
    return Personal(search, losses, choice, arrays[choice])
