"""Greedy and sampled generation, of one prompt or several at a time."""

from collections.abc import Iterator, Sequence
from threading import Event, Thread
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import (
        GenerationConfig,
        PreTrainedModel,
        PreTrainedTokenizerBase,
    )


def generate(
    model: "PreTrainedModel | PeftModel",
    tokenizer: "PreTrainedTokenizerBase",
    prompt: str,
    max_new_tokens: int,
    temperature: float = 0.0,
) -> Iterator[str]:
    """Yield the answer to a prompt piece by piece, as it is generated.

    Closing the iterator early ends the generation as well.

    Args:
        model: The model; left in eval mode.
        tokenizer: Its tokenizer.
        prompt: The whole prompt, template included.
        max_new_tokens: Most tokens of an answer.
        temperature: 0.0 takes the likeliest token each time.
    """
    from transformers import TextIteratorStreamer

    model.eval()
    inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
    inputs = {k: v.to(model.device) for k, v in inputs.items() if k != "token_type_ids"}
    streamer: Any = TextIteratorStreamer(
        tokenizer, skip_prompt=True, skip_special_tokens=True
    )
    settings = _settings(model, tokenizer, max_new_tokens, temperature)
    generation = _Generation(model, inputs, settings, streamer)
    generation.start()
    try:
        yield from streamer
    finally:
        generation.cancelled.set()
        generation.join()
    if generation.failure is not None:
        raise generation.failure


class _Generation(Thread):
    """One generation, in a thread of its own so that its pieces can be read meanwhile.

    Attributes:
        cancelled: Set it to end the generation after the current token.
        failure: What ended the generation, to be raised by the reader; None: nothing.
    """

    def __init__(
        self,
        model: "PreTrainedModel | PeftModel",
        inputs: dict[str, torch.Tensor],
        settings: "GenerationConfig",
        streamer: Any,
    ) -> None:
        super().__init__(daemon=True)
        self.cancelled = Event()
        self.failure: BaseException | None = None
        self._model, self._inputs = model, inputs
        self._settings, self._streamer = settings, streamer

    def run(self) -> None:
        """Generate; a failure ends the stream."""
        try:
            with torch.inference_mode():
                self._model.generate(
                    **self._inputs,
                    generation_config=self._settings,
                    streamer=self._streamer,
                    stopping_criteria=[self._is_cancelled],
                )
        except BaseException as error:  # noqa: BLE001 - raised again by the reader
            self.failure = error
            self._streamer.end()

    def _is_cancelled(self, ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        """Return for each sequence whether it ends here."""
        return torch.full((len(ids),), self.cancelled.is_set(), device=ids.device)


def generate_together(
    model: "PreTrainedModel | PeftModel",
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[str],
    max_new_tokens: int,
) -> list[str]:
    """Return the likeliest answers to several prompts, generated as one batch.

    With a 4-bit base on a CPU that takes little longer than one answer.

    Args:
        model: The model; left in eval mode.
        tokenizer: Its tokenizer.
        prompts: Whole prompts, template included; at least one.
        max_new_tokens: Most tokens of an answer.
    """
    model.eval()
    encoded = [tokenizer(p, add_special_tokens=False)["input_ids"] for p in prompts]
    width = max(map(len, encoded))
    # An answer follows its prompt, so prompts are padded on the left; with a token of
    # their own, since the repetition penalty would see another.
    ids = torch.tensor([row[:1] * (width - len(row)) + row for row in encoded])
    mask = torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in encoded])
    with torch.inference_mode():
        out = model.generate(
            input_ids=ids.to(model.device),
            attention_mask=mask.to(model.device),
            generation_config=_settings(model, tokenizer, max_new_tokens),
        )
    answers = tokenizer.batch_decode(out[:, width:], skip_special_tokens=True)
    return [answer.strip() for answer in answers]


def _settings(
    model: "PreTrainedModel | PeftModel",
    tokenizer: "PreTrainedTokenizerBase",
    max_new_tokens: int,
    temperature: float = 0.0,
) -> "GenerationConfig":
    """Return the settings of a generation."""
    from transformers import GenerationConfig

    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=temperature > 0,
        temperature=temperature if temperature > 0 else None,
        use_cache=True,
        repetition_penalty=1.1,
        eos_token_id=_ends(model, tokenizer),
        pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id,
    )


def _ends(model: Any, tokenizer: Any) -> list[int]:
    """Return every token id that ends an answer."""
    known = getattr(model.generation_config, "eos_token_id", None)
    ends = {tokenizer.eos_token_id}
    ends |= set(known) if isinstance(known, list) else {known}
    return sorted(end for end in ends if end is not None)
