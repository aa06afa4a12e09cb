"""What a run keeps on disk: adapters, the best round, checkpoints."""

from dataclasses import dataclass

from fedllm.adapters.spec import Arrays


@dataclass
class BestRound:
    """The round with the lowest validation loss; round 0 is the untuned model."""

    server_round: int
    loss: float
    arrays: Arrays
