"""What the server trains before round 1, on rows declared public: it costs no epsilon."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from fedllm.adapters.adapted_model import AdaptedModel
from fedllm.adapters.spec import Arrays
from fedllm.config import RunConfig
from fedllm.data.rows import load_public
from fedllm.data.tokens import tokenize
from fedllm.errors import DataError
from fedllm.evaluation.held_out_loss import held_out
from fedllm.training.own_best import OwnBestConfig, split_tenth, train_to_own_best

logger = logging.getLogger(__name__)


def train_on_public_rows(
    adapted: AdaptedModel, config: RunConfig, start: Arrays
) -> Arrays:
    """Return the values after training on `data.public-train`, stopped by a tenth of it.

    Validation and test rows have no part in it.

    Args:
        adapted: The resident model; its trained values are overwritten.
        config: Names the rows, and how they train.
        start: Where the training starts. It is the result if no training beats it.

    Raises:
        DataError: There are fewer than two usable rows, or they cannot be read.
    """
    rows = load_public(config.data, "train")
    length = config.train.max_length
    examples = tokenize(
        rows or [], adapted.tokenizer, config.data, length, whole_texts=True
    ).packed(length)
    if len(examples) < 2:
        raise DataError(
            f"data.public-train: {config.data.public_train} has {len(examples)} usable "
            "rows: one to train on and one that stops the training are needed"
        )

    def score(judging: Sequence[Mapping[str, Any]]) -> float:
        return held_out(adapted.model, judging, adapted.pad_token_id, config.train).loss

    logger.info("before round 1: training on %d public rows", len(examples))
    found = train_to_own_best(
        adapted,
        split_tenth(examples, config.seed),
        start,
        config.train,
        OwnBestConfig(
            [config.train.public_learning_rate],
            config.train.public_epochs,
            config.seed,
        ),
        score,
    )
    logger.info(
        "public rows: held-out loss %.3f -> %.3f after %d examples",
        *(found.losses[0], min(found.losses), found.num_examples),
    )
    return found.arrays
