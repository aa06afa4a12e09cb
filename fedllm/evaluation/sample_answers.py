"""Sample answers of the base and the tuned model to public questions."""

import logging
from collections.abc import Mapping
from typing import Any

from fedllm.evaluation.public_rows import PublicRows

logger = logging.getLogger(__name__)

_QUESTIONS = 3
_MAX_NEW_TOKENS = 32


def sample_answers(
    public: PublicRows,
    base: Mapping[str, Any],
    tuned: Mapping[str, Any],
    server_round: int,
) -> dict[str, Any] | None:
    """Return the answers of both models.

    Args:
        public: Rows declared public, and the model.
        base: The untrained adapter, which changes nothing.
        tuned: The trained adapter.
        server_round: The round of the trained adapter.

    Returns:
        The content of answers.json. None without public rows, and after a failure, which
        is logged in one line: the run has its result without sample answers.
    """
    try:
        rows = public.questions(_QUESTIONS)
        if not rows:
            return None
        questions = [question for question, _ in rows]
        before = public.answers(base, questions, _MAX_NEW_TOKENS)
        after = public.answers(tuned, questions, _MAX_NEW_TOKENS)
    except Exception as error:  # noqa: BLE001 - an example is never worth a run
        text = " ".join(str(error).split())[:200]
        logger.warning("no sample answers: %s: %s", type(error).__name__, text)
        return None
    return {
        "server_round": server_round,
        "max_new_tokens": _MAX_NEW_TOKENS,
        "answers": [
            {"question": question, "reference": reference, "base": one, "tuned": other}
            for (question, reference), one, other in zip(
                rows, before, after, strict=True
            )
        ],
    }
