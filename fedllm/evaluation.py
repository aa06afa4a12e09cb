"""How good a model is on rows it did not train on, and what it answers."""

import json
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fedllm.errors import DataError

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

_TOKENS_PER_BATCH = 2048
_TOKENS_PER_CHUNK = 128


@dataclass(frozen=True)
class HeldOut:
    """Held-out loss: mean negative log-likelihood per answer token, in nats."""

    loss: float
    num_examples: int
    num_tokens: int

    @property
    def perplexity(self) -> float:
        """exp(loss); inf where that overflows."""
        return math.exp(self.loss) if self.loss < 700 else math.inf


def answer_losses(
    model: "PreTrainedModel | PeftModel",
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    labels: torch.Tensor,
) -> torch.Tensor:
    """Return the negative log-likelihood of each answer token.

    The output head runs on the answer's positions only: with a vocabulary of 49,152
    scoring every position is a large part of a training step. It runs in chunks of
    positions, so that the logits of a frozen head never exist whole.

    Args:
        model: A causal language model, with or without a PEFT adapter.
        input_ids: (batch, length) token ids, padded on the right.
        attention_mask: (batch, length), 0 where padded.
        labels: (batch, length), the token id, or -100 where no loss is taken.

    Returns:
        (answer tokens in the batch,) float32 losses in nats.
    """
    # Here, since a server that evaluates nothing shall not hold transformers.
    from fedllm.packing import hidden_states

    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model
    hidden = hidden_states(base, input_ids, attention_mask)
    # A token is scored by the state before it; a row's last state scores nothing.
    following = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    targets = following[attention_mask.bool()]
    chosen = targets != -100
    head = base.get_output_embeddings()
    rows, wanted = hidden[chosen], targets[chosen]
    trained = any(parameter.requires_grad for parameter in head.parameters())
    if trained and torch.is_grad_enabled():
        return torch.nn.functional.cross_entropy(
            head(rows).float(), wanted, reduction="none"
        )
    losses: torch.Tensor = _ChunkedLosses.apply(  # type: ignore[no-untyped-call] # torch
        rows, wanted, head
    )
    return losses


class _ChunkedLosses(torch.autograd.Function):
    """Losses of a frozen head, whose logits live for one chunk of positions at a time.

    A position's loss depends on its own row alone. The forward pass therefore keeps each
    loss's gradient with respect to its row, and the backward pass only scales it: the
    head is not run twice.
    """

    @staticmethod
    def forward(
        ctx: Any, rows: torch.Tensor, wanted: torch.Tensor, head: Any
    ) -> torch.Tensor:
        needed = ctx.needs_input_grad[0]
        losses = torch.empty(len(rows), device=rows.device)
        gradients = torch.empty_like(rows) if needed else None
        for start in range(0, len(rows), _TOKENS_PER_CHUNK):
            part = slice(start, start + _TOKENS_PER_CHUNK)
            with torch.set_grad_enabled(needed):
                chunk = rows[part].detach().requires_grad_(needed)
                logits = head(chunk)
            scores = logits.detach().float().log_softmax(-1)
            targets = wanted[part, None]
            losses[part] = -scores.gather(1, targets)[:, 0]
            if gradients is not None:
                # The cross-entropy's gradient: the probabilities, less 1 at the target.
                back = scores.exp_().scatter_add_(
                    1, targets, torch.full_like(targets, -1, dtype=scores.dtype)
                )
                (gradients[part],) = torch.autograd.grad(
                    logits, chunk, back.to(logits.dtype)
                )
        ctx.save_for_backward(*[] if gradients is None else [gradients])
        return losses

    @staticmethod
    def backward(ctx: Any, scale: torch.Tensor) -> Any:
        (gradients,) = ctx.saved_tensors
        return gradients * scale[:, None].to(gradients.dtype), None, None


def collate(
    examples: Sequence[Mapping[str, Any]], pad_token_id: int
) -> dict[str, torch.Tensor]:
    """Pad tokenised examples on the right to the longest.

    Padding is told apart by the attention mask and labels of -100, never by its id,
    since a model's padding may equal its end of text.
    """
    length = max(len(example["input_ids"]) for example in examples)
    ids = torch.full((len(examples), length), pad_token_id)
    mask = torch.zeros((len(examples), length), dtype=torch.long)
    labels = torch.full((len(examples), length), -100)
    for row, example in enumerate(examples):
        size = len(example["input_ids"])
        ids[row, :size] = torch.tensor(example["input_ids"])
        mask[row, :size] = 1
        labels[row, :size] = torch.tensor(example["labels"])
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def labelled(tokenized: Any) -> list[dict[str, list[int]]]:
    """Return tokenised rows with labels: the token id in the answer, else -100."""
    return [
        {
            "input_ids": list(row["input_ids"]),
            "labels": [
                token if answer else -100
                for token, answer in zip(
                    row["input_ids"], row["completion_mask"], strict=True
                )
            ],
        }
        for row in tokenized.dataset
    ]


def held_out(
    model: "PreTrainedModel | PeftModel",
    examples: Sequence[Mapping[str, Any]],
    pad_token_id: int,
) -> HeldOut:
    """Measure the loss on tokenised, labelled examples.

    Args:
        model: The model; left in eval mode.
        examples: Rows with `input_ids` and `labels`.
        pad_token_id: Any token id.

    Raises:
        DataError: There is no answer token to score.
    """
    model.eval()
    device = next(model.parameters()).device
    total, tokens = 0.0, 0
    with torch.inference_mode():
        for batch in _batches(examples):
            inputs = {k: v.to(device) for k, v in collate(batch, pad_token_id).items()}
            losses = answer_losses(model, **inputs)
            total += float(losses.double().sum())
            tokens += losses.numel()
    if tokens == 0:
        raise DataError("there is no answer token to score: every row is empty")
    return HeldOut(total / tokens, len(examples), tokens)


def generate(
    model: "PreTrainedModel | PeftModel",
    tokenizer: "PreTrainedTokenizerBase",
    prompt: str,
    max_new_tokens: int,
    temperature: float = 0.0,
) -> Iterator[str]:
    """Yield the answer to a prompt piece by piece, as it is generated.

    Whoever closes the iterator early ends the generation as well.

    Args:
        model: The model; left in eval mode.
        tokenizer: Its tokenizer.
        prompt: The whole prompt, template included.
        max_new_tokens: Where to stop at the latest.
        temperature: 0.0 takes the likeliest token each time.
    """
    from threading import Event, Thread

    from transformers import GenerationConfig, TextIteratorStreamer

    model.eval()
    inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
    inputs = {k: v.to(model.device) for k, v in inputs.items() if k != "token_type_ids"}
    streamer: Any = TextIteratorStreamer(
        tokenizer, skip_prompt=True, skip_special_tokens=True
    )
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=temperature > 0,
        temperature=temperature if temperature > 0 else None,
        repetition_penalty=1.1,
        eos_token_id=_ends(model, tokenizer),
        pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id,
    )
    failure: list[BaseException] = []
    unwanted = Event()

    def is_over(ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        return torch.full((len(ids),), unwanted.is_set(), device=ids.device)

    def work() -> None:
        try:
            with torch.inference_mode():
                model.generate(
                    **inputs,
                    generation_config=settings,
                    streamer=streamer,
                    stopping_criteria=[is_over],
                    use_cache=True,
                )
        except BaseException as error:  # noqa: BLE001 - handed to the caller below
            failure.append(error)
            streamer.end()

    thread = Thread(target=work, daemon=True)
    thread.start()
    try:
        yield from streamer
    finally:
        unwanted.set()
        thread.join()
    if failure:
        raise failure[0]


def generate_together(
    model: "PreTrainedModel | PeftModel",
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[str],
    max_new_tokens: int,
) -> list[str]:
    """Return the likeliest answers to a few prompts, in one pass for all.

    Through a 4-bit base on a CPU that takes little longer than one answer.

    Args:
        model: The model; left in eval mode.
        tokenizer: Its tokenizer.
        prompts: Whole prompts, template included; at least one.
        max_new_tokens: Where to stop at the latest.
    """
    from transformers import GenerationConfig

    model.eval()
    pad = tokenizer.pad_token_id or tokenizer.eos_token_id
    encoded = [tokenizer(p, add_special_tokens=False)["input_ids"] for p in prompts]
    width = max(map(len, encoded))
    # An answer follows its prompt, so prompts are padded on the left; with a token of
    # their own, since the repetition penalty would see another.
    ids = torch.tensor([row[:1] * (width - len(row)) + row for row in encoded])
    mask = torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in encoded])
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        use_cache=True,
        repetition_penalty=1.1,
        eos_token_id=_ends(model, tokenizer),
        pad_token_id=pad,
    )
    with torch.inference_mode():
        out = model.generate(
            input_ids=ids.to(model.device),
            attention_mask=mask.to(model.device),
            generation_config=settings,
        )
    answers = tokenizer.batch_decode(out[:, width:], skip_special_tokens=True)
    return [answer.strip() for answer in answers]


@dataclass(frozen=True)
class MultipleChoice:
    """Share of questions whose right option has the highest mean log-probability."""

    accuracy: float
    """With the mean over the tokens of an option."""
    accuracy_per_byte: float
    """With the mean over the bytes of its UTF-8 text: lm-evaluation-harness's acc_bytes."""
    num_questions: int
    chance: float
    interval: tuple[float, float]
    """95 % Wilson interval of the accuracy."""


def load_questions(path: Path) -> list[dict[str, Any]]:
    """Read a multiple-choice file: JSONL with question, options and answer (an index).

    Raises:
        DataError: Names the first line that is not of that form.
    """
    try:
        lines = path.read_text("utf-8").split("\n")
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: is not UTF-8 text: {error.reason}") from None
    questions = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            question, options, answer = row["question"], row["options"], row["answer"]
            fine = isinstance(question, str) and type(answer) is int
            fine = fine and isinstance(options, list)
            fine = fine and all(
                isinstance(option, str) and option for option in options
            )
            fine = fine and len(options) >= 2 and 0 <= answer < len(options)
        except (ValueError, KeyError, TypeError):
            fine = False
        if not fine:
            raise DataError(
                f"{path}:{number}: needs question (text), options (at least two texts) "
                "and answer (index of the right option, from 0)"
            )
        questions.append(row)
    if not questions:
        raise DataError(f"{path}: has no question")
    return questions


def multiple_choice(
    model: "PreTrainedModel | PeftModel",
    tokenizer: "PreTrainedTokenizerBase",
    questions: Sequence[Mapping[str, Any]],
    prompt_of: Any,
) -> MultipleChoice:
    """Score each option by its mean log-probability after the question.

    Args:
        model: The model; left in eval mode.
        tokenizer: Its tokenizer.
        questions: Rows of `load_questions`.
        prompt_of: Question -> the whole prompt, template included.
    """
    model.eval()
    device = next(model.parameters()).device
    pad = tokenizer.pad_token_id or 0
    right, right_per_byte, chance = 0, 0, 0.0
    for row in questions:
        prompt = tokenizer(prompt_of(row["question"]), add_special_tokens=False)[
            "input_ids"
        ]
        examples = []
        for option in row["options"]:
            answer = tokenizer(option, add_special_tokens=False)["input_ids"]
            labels = [-100] * len(prompt) + answer
            examples.append({"input_ids": prompt + answer, "labels": labels})
        with torch.inference_mode():
            inputs = {k: v.to(device) for k, v in collate(examples, pad).items()}
            losses = answer_losses(model, **inputs).tolist()
        per_token, per_byte, start = [], [], 0
        for option, example in zip(row["options"], examples, strict=True):
            size = len(example["input_ids"]) - len(prompt)
            total = sum(losses[start : start + size])
            per_token.append(total / size)
            per_byte.append(total / len(option.encode("utf-8")))
            start += size
        right += per_token.index(min(per_token)) == row["answer"]
        right_per_byte += per_byte.index(min(per_byte)) == row["answer"]
        chance += 1 / len(row["options"])
    n = len(questions)
    interval = _wilson(right, n)
    return MultipleChoice(right / n, right_per_byte / n, n, chance / n, interval)


def _wilson(right: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """Return the 95 % Wilson score interval of a share."""
    share = right / n
    middle = share + z * z / (2 * n)
    spread = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return (middle - spread) / scale, (middle + spread) / scale


def _batches(
    examples: Sequence[Mapping[str, Any]],
) -> Iterator[list[Mapping[str, Any]]]:
    """Yield batches of similar length, so that little of a batch is padding."""
    batch: list[Mapping[str, Any]] = []
    for example in sorted(examples, key=lambda row: len(row["input_ids"])):
        if batch and len(example["input_ids"]) * (len(batch) + 1) > _TOKENS_PER_BATCH:
            yield batch
            batch = []
        batch.append(example)
    if batch:
        yield batch


def _ends(model: Any, tokenizer: Any) -> list[int]:
    """Return every token id that ends an answer."""
    known = getattr(model.generation_config, "eos_token_id", None)
    ends = {tokenizer.eos_token_id}
    ends |= set(known) if isinstance(known, list) else {known}
    return sorted(end for end in ends if end is not None)
