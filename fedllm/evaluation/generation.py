"""Greedy and sampled generation, one prompt or several at a time."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


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


def _ends(model: Any, tokenizer: Any) -> list[int]:
    """Return every token id that ends an answer."""
    known = getattr(model.generation_config, "eos_token_id", None)
    ends = {tokenizer.eos_token_id}
    ends |= set(known) if isinstance(known, list) else {known}
    return sorted(end for end in ends if end is not None)
