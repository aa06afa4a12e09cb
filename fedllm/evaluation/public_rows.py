"""Rows declared public: validation rows choose a round, test rows only report.

The base model is loaded when the first row is scored, so that a server without such rows
never needs it.
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from fedllm.adapters.spec import AdapterSpec
from fedllm.config import RunConfig
from fedllm.evaluation.held_out_loss import HeldOut

logger = logging.getLogger(__name__)

_Split = Literal["validation", "test"]


class PublicRows:
    """Scores adapters on public rows.

    Args:
        config: The run config.
        base_name: Folder or hub id of the base model.
        spec: The run's adapter.
        home: Where models are cached.
        model: The base with this adapter on it, where it is loaded already.
    """

    def __init__(
        self,
        config: RunConfig,
        base_name: str,
        spec: AdapterSpec,
        home: Path,
        model: Any = None,
    ) -> None:
        self._config = config
        self._base_name = base_name
        self._spec = spec
        self._home = home
        self._model: Any = model
        self._tokenizer: Any = None
        self._examples: dict[str, list[dict[str, Any]]] = {}

    def validation_loss(self, arrays: Mapping[str, Any]) -> float | None:
        """Return the loss on the fixed validation subset; None without such rows."""
        if self._config.strategy.evaluate_examples == 0:
            return None
        score = self._score("validation", arrays)
        return None if score is None else score.loss

    def test_loss(self, arrays: Mapping[str, Any]) -> HeldOut | None:
        """Return the score on all test rows; None without such rows."""
        return self._score("test", arrays)

    def questions(self, count: int) -> list[tuple[str, str]]:
        """Return (question, answer) of public rows, of test rows where there are any.

        Only rows of one question and one answer count, drawn by the run's seed.
        """
        from fedllm.data.prompts import to_prompt_completion
        from fedllm.data.rows import load_public

        data = self._config.data
        rows = load_public(data, "test")
        if rows is None:
            rows = load_public(data, "validation")
        found: list[tuple[str, str]] = []
        for row in () if rows is None else rows.shuffle(seed=self._config.seed):
            turns = to_prompt_completion(data, row)
            if turns is not None and len(turns[0]) == 1:
                found.append((turns[0][0]["content"], turns[1][0]["content"]))
            if len(found) == count:
                break
        return found

    def answers(
        self, arrays: Mapping[str, Any], questions: list[str], max_new_tokens: int
    ) -> list[str]:
        """Return an adapter's answers, the likeliest token each time."""
        from fedllm.adapters.peft_model import set_trained
        from fedllm.data.prompts import chat_prompt
        from fedllm.evaluation.generation import generate_together

        model, tokenizer = self._load_model(), self._load_tokenizer()
        set_trained(model, self._spec, arrays)
        prompts = [chat_prompt(tokenizer, text) for text in questions]
        return generate_together(model, tokenizer, prompts, max_new_tokens)

    def _score(self, split: _Split, arrays: Mapping[str, Any]) -> HeldOut | None:
        from fedllm.adapters.peft_model import set_trained
        from fedllm.evaluation.held_out_loss import held_out

        examples = self._load_examples(split)
        if not examples:
            return None
        model = self._load_model()
        set_trained(model, self._spec, arrays)
        return held_out(model, examples, self._load_tokenizer().pad_token_id or 0)

    def _load_examples(self, split: _Split) -> list[dict[str, Any]]:
        """Tokenise the rows of a split once."""
        if split not in self._examples:
            from fedllm.data.rows import load_public
            from fedllm.data.tokens import labelled, tokenize

            rows = load_public(self._config.data, split)
            examples: list[dict[str, Any]] = []
            if rows is not None:
                if split == "validation":
                    count = min(len(rows), self._config.strategy.evaluate_examples)
                    rows = rows.shuffle(seed=self._config.seed).select(range(count))
                tokenizer = self._load_tokenizer()
                length = self._config.train.max_length
                tokenized = tokenize(rows, tokenizer, self._config.data, length)
                examples = labelled(tokenized)
            self._examples[split] = examples
        return self._examples[split]

    def _load_tokenizer(self) -> Any:
        if self._tokenizer is None:
            from fedllm.models.loading import load_tokenizer

            self._tokenizer = load_tokenizer(self._base_name)
        return self._tokenizer

    def _load_model(self) -> Any:
        if self._model is None:
            from fedllm.adapters.peft_model import attach
            from fedllm.models.loading import load_base

            logger.info("loading the base model to evaluate on public rows")
            model = self._config.model
            base = load_base(
                self._base_name,
                model.quantization,
                self._home,
                quantize_embeddings=model.quantize_embeddings,
            )
            self._model = attach(base, self._spec)
        return self._model
