"""What is asked of every architecture: a small model, our ways through it, and the library's.

All errors are relative, and computed in float32, so that only rounding in another order of the
sums remains: 1e-5 of a loss, 1e-4 of a gradient or of logits. A head that is taken for another
was off by 0.1 % to 1,500 %.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from fedllm.adapters.adapted_model import AdaptedModel
from fedllm.adapters.files import save_adapter
from fedllm.adapters.peft_model import attach, initial_arrays
from fedllm.adapters.resolve import adapter_spec
from fedllm.config import AdapterConfig, TrainConfig
from fedllm.models import loading
from fedllm.models.answer_loss import answer_losses, collate
from fedllm.models.loading import load_base
from fedllm.models.location import load_config
from fedllm.training.per_example_gradients import PerExample
from tests.helpers.architectures import VOCABULARY, Architecture

LOSS, GRADIENT = 1e-5, 1e-4
"""Largest relative errors."""
PAD = 0
_IDS = torch.tensor([[1, 9, 10, 20, 30, 40, 50, 60]])


def examples(count: int = 4) -> list[dict[str, Any]]:
    """Return examples of uneven length that begin alike, as chats do."""
    draw = np.random.default_rng(0)
    rows = []
    for _ in range(count):
        size = int(draw.integers(6, 24))
        ids = [1, 9, 10, *draw.integers(8, VOCABULARY, size - 3).tolist()]
        start = int(draw.integers(3, size - 2))
        rows.append({"input_ids": ids, "labels": [-100] * start + ids[start:]})
    return rows


def save_model(architecture: Architecture, folder: Path) -> Path:
    """Write a small model of an architecture and a tokenizer of words; return the folder."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{i}" for i in range(4, VOCABULARY))]
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    vocabulary = {word: number for number, word in enumerate(words)}
    plain = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=plain, unk_token="<unk>", **names
    )
    tokenizer.save_pretrained(folder)
    architecture.model().save_pretrained(folder)
    return folder


@contextmanager
def in_float32() -> Iterator[None]:
    """Let models compute in float32 whatever this machine would choose."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loading, "compute_dtype", lambda device: torch.float32)
        yield


@dataclass
class Trial:
    """A small model with a LoRA adapter on it, as after some rounds."""

    folder: Path
    bits: int
    home: Path
    adapted: AdaptedModel
    arrays: dict[str, Any]

    @classmethod
    def load(
        cls, folder: Path, bits: int, home: Path, kind: str = "lora", **more: Any
    ) -> "Trial":
        """Load a saved model in some bits and attach an adapter."""
        with in_float32():
            base = load_base(str(folder), bits, home, "cpu")
        config = AdapterConfig(kind=kind, rank=2, **more)  # type: ignore[arg-type]
        spec = adapter_spec(config, load_config(str(folder)), 5)
        # The words as they are: AutoTokenizer would take them for the architecture's own.
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
        adapted = AdaptedModel(attach(base, spec), tokenizer, spec)
        draw = np.random.default_rng(0)
        arrays = {
            name: (start + draw.normal(0, 0.1, start.shape)).astype(np.float32)
            for name, start in initial_arrays(spec).items()
        }
        adapted.set(arrays)
        return cls(folder, bits, home, adapted, arrays)

    @property
    def base(self) -> Any:
        """The base model with the adapter in it."""
        return self.adapted.model.get_base_model()

    def loss_error(self) -> float:
        """Return how far our mean answer loss is from the model's own."""
        self.base.eval()
        with torch.no_grad():
            ours = answer_losses(self.adapted.model, **collate(examples(), PAD)).mean()
            return relative_error(ours, self._own_loss(examples()))

    def gradient_error(self) -> float:
        """Return how far the gradient of our loss is from that of the model's own."""
        self.base.train()
        loss = answer_losses(self.adapted.model, **collate(examples(), PAD)).mean()
        return relative_error(self._gradient(loss), self._own_gradient(examples()))

    def step_error(self) -> float:
        """Return how far a step of the trainer is from the model's own gradient."""
        from fedllm.training.sft import train_adapter
        from fedllm.training.task import RoundTask

        config = TrainConfig(
            batch_size=4,
            gradient_accumulation=1,
            local_steps=1,
            optimizer="sgd",
            max_grad_norm=0.0,
            warmup_steps=0,
            weight_decay=0.0,
        )
        wanted = self._own_gradient(examples())
        after = train_adapter(
            self.adapted, examples(), config, RoundTask(self.arrays, 1.0)
        )
        names = {id(p): name for name, p in self.adapted.parameters().items()}
        moved = [
            torch.from_numpy(self.arrays[names[id(p)]] - after.arrays[names[id(p)]])
            for p in self._trained()
        ]
        self.adapted.set(self.arrays)
        return relative_error(torch.cat([m.flatten() for m in moved]), wanted)

    def example_error(self) -> float:
        """Return how far an example's gradient is from a loop's; inf if company matters."""
        ordered = sorted(examples(3), key=lambda row: len(row["input_ids"]))
        self.base.train()
        rows = torch.cat(
            list(PerExample(self.adapted.model, PAD).gradients(ordered, 2))
        )
        alone = list(PerExample(self.adapted.model, PAD).gradients(ordered[1:2], 2))
        if len(rows) != len(ordered) or not torch.equal(alone[0][0], rows[1]):
            return float("inf")
        wanted = [self._own_gradient([example]) for example in ordered]
        return max(map(relative_error, rows, wanted))

    def answer(self) -> str:
        """Generate with the resident model."""
        from fedllm.evaluation.generation import generate

        tokenizer = self.adapted.tokenizer
        pieces = generate(self.adapted.model.eval(), tokenizer, "w5 w6", 3, 0.0)
        return "".join(pieces)

    def reopened_error(self) -> float:
        """Save the adapter; return how far the logits are of a model that PEFT opens."""
        from peft import PeftModel

        from fedllm.adapters.peft_model import quiet_peft

        folder = self._save()
        with in_float32(), quiet_peft():
            base = load_base(str(self.folder), self.bits, self.home, "cpu")
            opened = PeftModel.from_pretrained(base, str(folder)).eval()
        return relative_error(logits(opened), logits(self.adapted.model))

    def export_error(self) -> float:
        """Export the merged model in the trial's bits; return how far its logits are.

        Quantising what was merged is another rounding than an adapter on a quantised base:
        in 4 or 8 bit it only has to open and answer.
        """
        from transformers import AutoModelForCausalLM

        from fedllm.commands.export import export
        from fedllm.models.quantization import keep_gradients_right

        out = self.home / f"merged-{self.bits}"
        with in_float32():
            export(self._save(), out, self.bits)
        merged = AutoModelForCausalLM.from_pretrained(out).eval()
        if self.bits == 0:
            return relative_error(logits(merged), logits(self.adapted.model))
        keep_gradients_right(merged)
        return 0.0 if logits(merged).isfinite().all() else float("inf")

    def _save(self) -> Path:
        folder = self.home / f"adapter-{self.bits}"
        origin = {"quantization": self.bits, "server_round": 1}
        spec = self.adapted.spec
        save_adapter(folder, spec, self.arrays, str(self.folder), origin)
        return folder

    def _trained(self) -> list[Any]:
        return [p for p in self.adapted.model.parameters() if p.requires_grad]

    def _own_loss(self, rows: Sequence[dict[str, Any]]) -> Any:
        return self.adapted.model(**collate(rows, PAD), use_cache=False).loss

    def _own_gradient(self, rows: Sequence[dict[str, Any]]) -> torch.Tensor:
        self.base.train()
        return self._gradient(self._own_loss(rows))

    def _gradient(self, loss: torch.Tensor) -> torch.Tensor:
        trained = self._trained()
        gradients = torch.autograd.grad(loss, trained, allow_unused=True)
        return torch.cat(
            [
                (torch.zeros_like(p) if g is None else g).flatten()
                for p, g in zip(trained, gradients, strict=True)
            ]
        )


def logits(model: Any) -> torch.Tensor:
    """Return a model's scores of a few tokens."""
    with torch.no_grad():
        scores: torch.Tensor = model.eval()(input_ids=_IDS, use_cache=False).logits
    return scores.float()


def relative_error(got: torch.Tensor, wanted: torch.Tensor) -> float:
    """Return the norm of a difference over that of what is wanted."""
    return float((got - wanted).norm() / wanted.norm())


def facts(trial: Trial) -> list[str]:
    """Return how an architecture is adapted and computed, as cells of the page's table."""
    from fedllm.models.attention import NAME
    from fedllm.models.fast_paths import fast_paths

    base = trial.base
    paths = fast_paths(base)
    names = sorted({name.rpartition(".")[2] for name in trial.adapted.spec.modules})
    is_ours = base.config._attn_implementation == NAME
    together = PerExample(trial.adapted.model, PAD)._by_layers
    return [
        ", ".join(f"`{name}`" for name in names),
        "in parts" if paths.head else "the model's",
        "ours" if is_ours else "the library's",
        "yes" if paths.packing else "no",
        "several" if together else "one",
    ]


def faults(trial: Trial) -> list[str]:
    """Return what does not hold of a model in a trial's bits, training included."""
    checks = {
        "loss": (trial.loss_error, LOSS),
        "step": (trial.step_error, GRADIENT),
        "per-example gradients": (trial.example_error, GRADIENT),
        "loss after training": (trial.loss_error, LOSS),
        "PEFT": (trial.reopened_error, GRADIENT),
        "export": (trial.export_error, GRADIENT),
    }
    found = []
    for name, (error, most) in checks.items():
        if not (value := error()) < most:
            found.append(f"{name}: off by {value:.1e}")
    trial.answer()
    return found
