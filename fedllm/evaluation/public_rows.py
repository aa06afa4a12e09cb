"""Scores on rows declared public: validation rows choose a round, test rows report.

The base model is loaded when the first row is tokenised, so that a server without such
rows never needs it.
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fedllm.config import RunConfig
from fedllm.evaluation.held_out_loss import HeldOut

if TYPE_CHECKING:
    from fedllm.adapters.adapted_model import AdaptedModel
    from fedllm.data.tokens import Example

logger = logging.getLogger(__name__)

_Split = Literal["validation", "test"]


class PublicRows:
    """Scores adapters on public rows.

    Args:
        config: The run config, with an adapter kind that is not `auto`.
        home: The program's folder, where models are cached.
        adapted: The run's model, if it is loaded already.
    """

    def __init__(
        self,
        config: RunConfig,
        home: Path,
        adapted: "AdaptedModel | None" = None,
    ) -> None:
        self._config = config
        self._home = home
        self._adapted = adapted
        self._examples: dict[str, list[Example]] = {}
        self._latest: tuple[Any, HeldOut | None] = (None, None)

    def validation_loss(self, arrays: Mapping[str, Any]) -> float | None:
        """Return the loss on the fixed validation subset; None without such rows."""
        if self._config.strategy.evaluate_examples == 0:
            return None
        score = self._score("validation", arrays)
        self._latest = (arrays, score)
        return None if score is None else score.loss

    def validation_pairs(self, arrays: Mapping[str, Any]) -> HeldOut | None:
        """Return the latest score on validation rows, if they are pairs and it is of these."""
        of, score = self._latest
        is_asked = of is arrays and score is not None and score.preferred is not None
        return score if is_asked else None

    def test_loss(self, arrays: Mapping[str, Any]) -> HeldOut | None:
        """Return the score on all test rows; None without such rows."""
        return self._score("test", arrays)

    def questions(self, count: int) -> list[tuple[str, str]]:
        """Return (question, answer) of some public rows: test rows if there are any.

        The run's seed draws them from the rows that have one question and one answer.
        """
        from fedllm.data.rows import load_public
        from fedllm.data.shapes import PlainText, read_row
        from fedllm.data.turns import UnusableRowError

        data = self._config.data
        rows = load_public(data, "test")
        if rows is None:
            rows = load_public(data, "validation")
        pairs: list[tuple[str, str]] = []
        for row in () if rows is None else rows.shuffle(seed=self._config.seed):
            try:
                content = read_row(data, row)
            except UnusableRowError:
                continue
            if not isinstance(content, PlainText) and len(content.turns) == 2:
                question, answer = content.turns
                pairs.append((question["content"], answer["content"]))
            if len(pairs) == count:
                break
        return pairs

    def answers(
        self, arrays: Mapping[str, Any], questions: list[str], max_new_tokens: int
    ) -> list[str]:
        """Return an adapter's answers, made of the likeliest token each time."""
        from fedllm.data.prompts import chat_prompt
        from fedllm.evaluation.generation import generate_together

        adapted = self.adapted()
        adapted.set(arrays)
        prompts = [chat_prompt(adapted.tokenizer, text) for text in questions]
        return generate_together(
            adapted.model, adapted.tokenizer, prompts, max_new_tokens
        )

    def _score(self, split: _Split, arrays: Mapping[str, Any]) -> HeldOut | None:
        from fedllm.evaluation.held_out_loss import held_out

        examples = self._load_examples(split)
        if not examples:
            return None
        adapted = self.adapted()
        adapted.set(arrays)
        pad = adapted.pad_token_id
        return held_out(adapted.model, examples, pad, self._config.train)

    def _load_examples(self, split: _Split) -> "list[Example]":
        """Tokenise the rows of a split once."""
        if split not in self._examples:
            from fedllm.data.model_limits import vocabulary_of
            from fedllm.data.row_report import why_unusable
            from fedllm.data.rows import load_public
            from fedllm.data.tokens import tokenize

            rows = load_public(self._config.data, split)
            examples: list[Example] = []
            if rows is not None:
                if split == "validation":
                    count = min(len(rows), self._config.strategy.evaluate_examples)
                    rows = rows.shuffle(seed=self._config.seed).select(range(count))
                adapted, length = self.adapted(), self._config.train.max_length
                tokenized = tokenize(
                    rows,
                    adapted.tokenizer,
                    self._config.data,
                    length,
                    vocabulary_of(adapted.model.config),
                    whole_texts=True,
                )
                if tokenized.unusable:
                    logger.warning(
                        "public %s rows: %d of %d are not used: %s",
                        *(split, sum(map(len, tokenized.unusable.values()))),
                        *(len(tokenized.records), why_unusable(tokenized)),
                    )
                examples = tokenized.packed(length)
            self._examples[split] = examples
        return self._examples[split]

    def adapted(self) -> "AdaptedModel":
        """Return the run's model, loaded at the first call; its values are overwritten."""
        if self._adapted is None:
            from fedllm.adapters.adapted_model import load_adapted_model

            logger.info("loading the base model to evaluate on public rows")
            self._adapted = load_adapted_model(self._config, self._home)
        return self._adapted
