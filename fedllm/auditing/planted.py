"""Sentences with a secret, planted among rows, and how much a model remembers of them.

Exposure is that of Carlini et al. 2019 (The Secret Sharer, arXiv 1802.08232): by how many bits
the planted secret is likelier than others of its form. It is estimated by its rank among secrets
that were drawn likewise and planted nowhere. A model that never saw a secret has, in the mean,
about 1.4 bits. Reciting is stricter: the likeliest answer has the whole secret.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt

from fedllm.adapters.adapted_model import AdaptedModel
from fedllm.config import RunConfig
from fedllm.data.prompts import chat_prompt
from fedllm.data.tokens import tokenize
from fedllm.errors import DataError
from fedllm.evaluation.generation import generate_together
from fedllm.models.answer_loss import answer_losses, collate

_DIGITS = 6
_OTHERS = 63
_CONFIDENCE = 0.95
_RESAMPLES = 4000
_TOGETHER = 8
_SCORED_TOGETHER = 16
_MORE_TOKENS = 8
_SYLLABLES = ("ba", "du", "fe", "go", "ki", "lo", "ma", "nu", "pe", "ri", "so", "ta")


@dataclass(frozen=True)
class Planted:
    """One sentence.

    Attributes:
        client: The client that gets it.
        question: Its question, which names nobody else's.
        answer: Its answer, which ends in the secret.
        secret: The secret.
        others: Answers with other secrets, planted nowhere.
    """

    client: int
    question: str
    answer: str
    secret: str
    others: Sequence[str]


@dataclass(frozen=True)
class Memory:
    """How much a model remembers, each with its 95 % interval over the sentences.

    Attributes:
        exposure: Mean exposure in bits, at most log2 of the secrets that are compared.
        exposure_low: By resampling sentences.
        exposure_high: Likewise.
        recited: Sentences whose secret the likeliest answer has.
        recited_low: Share of them, by Clopper and Pearson.
        recited_high: Likewise.
    """

    exposure: float
    exposure_low: float
    exposure_high: float
    recited: int
    recited_low: float
    recited_high: float

    def as_dict(self) -> dict[str, Any]:
        """Return the content for memorised.json."""
        return asdict(self)


MOST_EXPOSURE = float(np.log2(_OTHERS + 1))
"""The exposure of a secret that is likelier than all others that are compared."""


def make_planted(count: int, clients: Sequence[int], seed: int) -> list[Planted]:
    """Make sentences for clients, one after the other.

    Args:
        count: How many, at least 1.
        clients: The clients that get them.
        seed: The same seed makes the same sentences.
    """
    generator = np.random.default_rng([seed, count])
    names: list[str] = []
    while len(names) < count:
        name = "".join(generator.choice(_SYLLABLES, 4)).capitalize()
        if name not in names:
            names.append(name)
    return [
        _planted(name, clients[number % len(clients)], generator)
        for number, name in enumerate(names)
    ]


def _planted(name: str, client: int, generator: np.random.Generator) -> Planted:
    secrets = list(dict.fromkeys(_secret(generator) for _ in range(2 * _OTHERS)))
    answers = [f"The record number of {name} is {s}." for s in secrets[: _OTHERS + 1]]
    question = f"What is the record number of {name}?"
    return Planted(client, question, answers[0], secrets[0], answers[1:])


def _secret(generator: np.random.Generator) -> str:
    return " ".join(map(str, generator.integers(0, 10, _DIGITS)))


def measure_memory(
    adapted: AdaptedModel,
    arrays: Mapping[str, Any],
    planted: Sequence[Planted],
    config: RunConfig,
) -> Memory:
    """Measure how much a model remembers of planted sentences.

    Args:
        adapted: The model; its trained values are overwritten.
        arrays: The adapter's values.
        planted: The sentences.
        config: Names columns and length, as the training had them.

    Raises:
        DataError: An answer lies beyond train.max-length.
    """
    adapted.set(arrays)
    exposures = [
        exposure(_losses(adapted, [one.answer, *one.others], one.question, config))
        for one in planted
    ]
    return summary(exposures, _recited(adapted, planted))


def exposure(losses: Sequence[float]) -> float:
    """Return the exposure in bits of the first of some secrets, by their losses.

    A tie counts as half a place.
    """
    first, *others = losses
    rank = 1 + sum(1.0 * (o < first) + 0.5 * (o == first) for o in others)
    return float(np.log2(len(losses)) - np.log2(rank))


def summary(exposures: Sequence[float], recited: int) -> Memory:
    """Return means and intervals over the sentences."""
    from scipy.stats import beta

    values: npt.NDArray[np.float64] = np.asarray(exposures)
    generator = np.random.default_rng(0)
    drawn = generator.integers(0, len(values), (_RESAMPLES, len(values)))
    tail = (1 - _CONFIDENCE) / 2
    low, high = np.quantile(values[drawn].mean(axis=1), [tail, 1 - tail])
    count = len(values)
    return Memory(
        float(values.mean()),
        float(low),
        float(high),
        recited,
        float(beta.ppf(tail, recited, count - recited + 1)) if recited else 0.0,
        (
            float(beta.ppf(1 - tail, recited + 1, count - recited))
            if recited < count
            else 1.0
        ),
    )


def planted_rows(planted: Sequence[Planted], config: RunConfig) -> list[dict[str, str]]:
    """Return each sentence as a row of the columns that the run config names."""
    return [_row(one.question, one.answer, config) for one in planted]


def _row(question: str, answer: str, config: RunConfig) -> dict[str, str]:
    return {config.data.prompt_column: question, config.data.response_column: answer}


def _losses(
    adapted: AdaptedModel, answers: Sequence[str], question: str, config: RunConfig
) -> list[float]:
    """Return the loss of each answer, in nats over all of its tokens.

    Raises:
        DataError: One lies beyond train.max-length.
    """
    rows = [_row(question, answer, config) for answer in answers]
    found = tokenize(rows, adapted.tokenizer, config.data, config.train.max_length)
    if None in found.records or found.truncated:
        raise DataError(
            "audit --memorised: a planted sentence lies beyond train.max-length "
            f"{config.train.max_length}: set a larger one"
        )
    examples = [example for example in found.records if example is not None]
    return [
        loss
        for start in range(0, len(examples), _SCORED_TOGETHER)
        for loss in _batch_losses(adapted, examples[start : start + _SCORED_TOGETHER])
    ]


def _batch_losses(
    adapted: AdaptedModel, examples: Sequence[Mapping[str, Any]]
) -> list[float]:
    import torch

    model = adapted.model
    model.eval()
    device = next(model.parameters()).device
    batch = collate(examples, adapted.pad_token_id)
    with torch.inference_mode():
        losses = answer_losses(model, **{k: v.to(device) for k, v in batch.items()})
    # Token by token, example by example; the first token of a text has no loss.
    rest = iter(losses.double().tolist())
    counts = [sum(label != -100 for label in e["labels"][1:]) for e in examples]
    return [sum(islice(rest, count)) for count in counts]


def _recited(adapted: AdaptedModel, planted: Sequence[Planted]) -> int:
    """Return how many secrets the model's likeliest answers have."""
    tokenizer = adapted.tokenizer
    longest = max(len(tokenizer(one.answer)["input_ids"]) for one in planted)
    found = 0
    for start in range(0, len(planted), _TOGETHER):
        some = planted[start : start + _TOGETHER]
        prompts = [chat_prompt(tokenizer, one.question) for one in some]
        answers = generate_together(
            adapted.model, tokenizer, prompts, longest + _MORE_TOKENS
        )
        found += sum(
            _digits(one.secret) in _digits(answer)
            for one, answer in zip(some, answers, strict=True)
        )
    return found


def _digits(text: str) -> str:
    return "".join(character for character in text if character.isdigit())
