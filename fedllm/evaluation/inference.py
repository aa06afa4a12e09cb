"""Who answers: a base model, with the adapter of a run, or of plain PEFT, on or off."""

import contextlib
import os
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedllm.config import RunConfig, fedllm_home, parse_run_config
from fedllm.errors import AdapterError, FedllmError

Turn = tuple[str, str]
"""A question and its answer."""


@dataclass
class ModelChoice:
    """What answers: a base model, perhaps with an adapter.

    Attributes:
        folder: The adapter; None for the untuned base.
        base_name: Folder or hub id of the base model.
        quantization: Bits of the base.
        in_float32: Whether an unquantised base computes in float32.
        described: Which model, round and run, for a person.
        config: The run's config where the adapter is of a run of ours.
    """

    folder: Path | None
    base_name: str
    quantization: int
    described: str
    config: RunConfig | None
    in_float32: bool = False


class ChatModel:
    """The model, loaded once, with the adapter on or off."""

    def __init__(self, subject: ModelChoice) -> None:
        # What transformers and bitsandbytes say while loading is not for this screen.
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        from fedllm.adapters.files import load_adapter
        from fedllm.models.loading import load_base, load_tokenizer

        self.subject = subject
        self.tokenizer = load_tokenizer(subject.base_name)
        base = load_base(
            subject.base_name,
            subject.quantization,
            fedllm_home(),
            in_float32=subject.in_float32,
        )
        self.model: Any = base
        if subject.folder is not None:
            self.model = load_adapter(base, subject.folder)

    def prompt(self, question: str) -> str:
        """Return the prompt of a question without history."""
        from fedllm.data.prompts import chat_prompt

        return chat_prompt(self.tokenizer, question)

    def prompt_after(self, history: Sequence[Turn], question: str, num_new: int) -> str:
        """Return the prompt with as much of the latest history as the model can hold.

        Args:
            history: Earlier turns, the oldest first.
            question: What is asked now.
            num_new: Tokens that the answer may take.
        """
        from fedllm.data.prompts import chat_prompt

        limit = getattr(self.model.config, "max_position_embeddings", None) or 2048
        for start in range(len(history) + 1):
            prompt = chat_prompt(self.tokenizer, question, history[start:])
            # Not verbose: what is too long is the very question.
            encoded = self.tokenizer(prompt, add_special_tokens=False, verbose=False)
            if len(encoded["input_ids"]) + num_new <= limit:
                break
        return prompt

    def answer(
        self,
        question: str,
        tuned: bool,
        history: Sequence[Turn] = (),
        max_new_tokens: int = 96,
        temperature: float = 0.0,
    ) -> Generator[str, None, None]:
        """Yield the answer piece by piece; whoever closes it ends the generation."""
        from fedllm.evaluation.generation import generate

        with self.adapter(tuned):
            yield from generate(
                self.model,
                self.tokenizer,
                self.prompt_after(history, question, max_new_tokens),
                max_new_tokens,
                temperature,
            )

    def adapter(self, tuned: bool) -> Any:
        """Return a context in which the adapter is on or off."""
        if tuned or self.subject.folder is None:
            return contextlib.nullcontext()
        return self.model.disable_adapter()

    def both(self) -> list[tuple[str, bool]]:
        """Return the base, and the tuned model where there is one."""
        tuned = [] if self.subject.folder is None else [("tuned", True)]
        return [("base", False), *tuned]


def find_model(peft_path: str | None, home: Path) -> ModelChoice:
    """Find the adapter that is asked for, else what the latest run recommends.

    Raises:
        AdapterError: There is none.
    """
    from fedllm.adapters.files import read_base_name, read_origin
    from fedllm.runs.directory import CONFIG_FILE, RESULT_FILE

    if peft_path is None:
        latest = home / "runs" / "latest"
        if not (latest / RESULT_FILE).exists():
            raise AdapterError(
                f"{latest}: no finished run there: start one (see the README), or name "
                "an adapter folder with --peft-path"
            )
        recommended = _entry(latest / RESULT_FILE, "recommended")
        if recommended == "base":
            run_file = latest / CONFIG_FILE
            config = parse_run_config(_entry(run_file, "run_config"))
            text = (
                f"answers: the untuned {config.model.name}, since in the latest run "
                f"({latest.resolve()}) the tuned one did not beat it"
            )
            bits = config.model.quantization
            return ModelChoice(None, _entry(run_file, "base"), bits, text, config)
        peft_path = str(latest.resolve() / Path(recommended).name)
    folder = Path(peft_path).expanduser().absolute()
    base_name, origin = read_base_name(folder), read_origin(folder)
    of_run: RunConfig | None = None
    if (folder.parent / CONFIG_FILE).exists() and origin:
        of_run = parse_run_config(_entry(folder.parent / CONFIG_FILE, "run_config"))
    round_text = f", round {origin['server_round']}" if origin else ""
    name = origin.get("model", base_name)
    text = f"answers: {name} with the adapter {folder}{round_text}"
    return ModelChoice(
        folder, base_name, int(origin.get("quantization", 4)), text, of_run
    )


def _entry(path: Path, key: str) -> Any:
    """Return one entry of a run's JSON file.

    Raises:
        FedllmError: The file lacks it.
    """
    from fedllm.runs.directory import read_json

    content = read_json(path)
    if key not in content:
        raise FedllmError(f"{path}: is damaged: it has no {key}")
    return content[key]
