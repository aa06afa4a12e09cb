"""Inference with a base model and an optional adapter, from one of our runs or plain PEFT."""

import contextlib
import os
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedllm.config import RunConfig, fedllm_home
from fedllm.config_parsing import parse_run_config
from fedllm.errors import AdapterError, FedllmError
from fedllm.foreign_text import printable
from fedllm.runs.directory import CONFIG_FILE, RESULT_FILE, read_json

if TYPE_CHECKING:
    from fedllm.adapters.adapted_model import AdaptedModel
    from fedllm.adapters.spec import Arrays

Turn = tuple[str, str]
"""A question and its answer."""

BASE = "base"
"""Name of the untuned model among `ChatModel.variants`."""


@dataclass
class ModelChoice:
    """Which base model to load, and which adapter if any.

    Attributes:
        folder: The adapter; None for the untuned base.
        base_name: Folder or hub id of the base model.
        quantization: Bits of the base.
        described: Model, round and run in a sentence.
        config: The run's config if the adapter is of one of our runs.
        in_float32: Whether an unquantised base computes in float32.
    """

    folder: Path | None
    base_name: str
    quantization: int
    described: str
    config: RunConfig | None
    in_float32: bool = False


class ChatModel:
    """The model, loaded once, with the adapter on or off."""

    def __init__(self, choice: ModelChoice) -> None:
        # The log lines of transformers and bitsandbytes would run into the answers.
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        from fedllm.adapters.files import load_adapter, load_adapter_tokenizer
        from fedllm.models.loading import load_base, load_tokenizer

        self.choice = choice
        if choice.folder is None:
            self.tokenizer = load_tokenizer(choice.base_name)
        else:
            self.tokenizer = load_adapter_tokenizer(choice.folder, choice.base_name)
        base = load_base(
            choice.base_name,
            choice.quantization,
            fedllm_home(),
            in_float32=choice.in_float32,
        )
        self.model: Any = base
        if choice.folder is not None:
            self.model = load_adapter(base, choice.folder)

    def prompt(self, question: str) -> str:
        """Return the prompt of a question without history."""
        from fedllm.data.prompts import chat_prompt

        return chat_prompt(self.tokenizer, question)

    def prompt_after(self, history: Sequence[Turn], question: str, num_new: int) -> str:
        """Return the prompt with as much of the latest history as the model can hold.

        Args:
            history: Earlier turns, the oldest first.
            question: The question to answer.
            num_new: Most tokens of the answer.
        """
        from fedllm.data.prompts import chat_prompt

        limit = getattr(self.model.config, "max_position_embeddings", None) or 2048
        for start in range(len(history) + 1):
            prompt = chat_prompt(self.tokenizer, question, history[start:])
            # Not verbose: the tokenizer would warn of a length that is cut here.
            encoded = self.tokenizer(prompt, add_special_tokens=False, verbose=False)
            if len(encoded["input_ids"]) + num_new <= limit:
                break
        return prompt

    def answer(
        self,
        question: str,
        variant: str,
        history: Sequence[Turn] = (),
        max_new_tokens: int = 96,
        temperature: float = 0.0,
    ) -> Generator[str, None, None]:
        """Yield the answer piece by piece; closing the generator ends the generation."""
        from fedllm.evaluation.generation import generate

        with self.adapter(variant):
            yield from generate(
                self.model,
                self.tokenizer,
                self.prompt_after(history, question, max_new_tokens),
                max_new_tokens,
                temperature,
            )

    def adapter(self, variant: str) -> Any:
        """Return a context in which one of `variants` answers."""
        if variant != BASE or self.choice.folder is None:
            return contextlib.nullcontext()
        return self.model.disable_adapter()

    def variants(self) -> list[str]:
        """Return the names of the base, and of the tuned model if any."""
        return [BASE] if self.choice.folder is None else [BASE, "tuned"]


class CandidatesChat(ChatModel):
    """A resident model with several adapters, of which the named one answers.

    Args:
        choice: What answers, in words, and the run's config.
        adapted: The model.
        candidates: Name -> trained values.
    """

    def __init__(
        self,
        choice: ModelChoice,
        adapted: "AdaptedModel",
        candidates: "Mapping[str, Arrays]",
    ) -> None:
        self.choice = choice
        self.tokenizer = adapted.tokenizer
        self.model = adapted.model.eval()
        self._adapted = adapted
        self._candidates = candidates

    def adapter(self, variant: str) -> Any:
        """Return a context in which one of `variants` answers."""
        self._adapted.set(self._candidates[variant])
        return contextlib.nullcontext()

    def variants(self) -> list[str]:
        """Return the names of the candidates."""
        return list(self._candidates)


def find_model(peft_path: str | None, home: Path) -> ModelChoice:
    """Return the model of an adapter folder, or the one that the latest run recommends.

    Args:
        peft_path: The adapter folder; None for the latest run.
        home: The program's folder.

    Raises:
        AdapterError: There is no such folder, or no finished run.
    """
    if peft_path is not None:
        return _model_in(Path(peft_path).expanduser().absolute())
    latest = home / "runs" / "latest"
    if not (latest / RESULT_FILE).exists():
        raise AdapterError(
            f"{latest}: no finished run there: start one (see the README), or name "
            "an adapter folder with --peft-path"
        )
    recommended = _entry(latest / RESULT_FILE, "recommended")
    if recommended == "base":
        return _base_of(latest)
    return _model_in(latest.resolve() / Path(recommended).name)


def _base_of(run: Path) -> ModelChoice:
    """Return the untuned base of a run whose tuned model did not beat it."""
    config = parse_run_config(_entry(run / CONFIG_FILE, "run_config"))
    described = (
        f"answers: the untuned {config.model.name}, since in the latest run "
        f"({run.resolve()}) the tuned one did not beat it"
    )
    base_name = _entry(run / CONFIG_FILE, "base")
    return ModelChoice(None, base_name, config.model.quantization, described, config)


def _model_in(folder: Path) -> ModelChoice:
    """Return the model of an adapter folder, of a run or of plain PEFT."""
    from fedllm.adapters.files import read_base_name, read_origin

    base_name, origin = read_base_name(folder), read_origin(folder)
    run_file = folder.parent / CONFIG_FILE
    config: RunConfig | None = None
    if run_file.exists() and origin:
        config = parse_run_config(_entry(run_file, "run_config"))
    round_text = f", round {origin['server_round']}" if origin else ""
    described = (
        f"answers: {_shown(base_name, origin)} with the adapter {folder}{round_text}"
    )
    # Plain PEFT does not store the bits of its base.
    bits = int(origin.get("quantization", 4))
    return ModelChoice(folder, base_name, bits, described, config)


def _shown(base_name: str, origin: Mapping[str, Any]) -> str:
    """Return the name of the base that is loaded, short only where it is the same."""
    name = str(origin.get("model", base_name))
    is_same = name == base_name or Path(base_name).name == name
    return printable(name if is_same else base_name)


def _entry(path: Path, key: str) -> Any:
    """Return one entry of a run's JSON file.

    Raises:
        FedllmError: The file lacks it.
    """
    content = read_json(path)
    if key not in content:
        raise FedllmError(f"{path}: is damaged: it has no {key}")
    return content[key]
