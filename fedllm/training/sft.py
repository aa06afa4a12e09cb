"""Supervised fine-tuning of an adapter on one client's examples, by TRL's trainer."""

import logging
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from datasets import Dataset
from transformers.trainer_callback import PrinterCallback, TrainerCallback
from trl import SFTConfig, SFTTrainer

from fedllm.adapters.adapted_model import AdaptedModel
from fedllm.config import TrainConfig
from fedllm.data.tokens import texts_of
from fedllm.models.answer_loss import answer_losses, collate
from fedllm.models.limits import require_known_tokens
from fedllm.training.activation_compression import compressed_activations
from fedllm.training.client_trainer import ClientTrainer
from fedllm.training.mapped_weights import release_mapped_pages
from fedllm.training.objectives import objective_of
from fedllm.training.plugin import load_plugin
from fedllm.training.result import Trained, restoring
from fedllm.training.task import RoundTask

logger = logging.getLogger(__name__)


class AdapterTrainer(ClientTrainer, SFTTrainer):  # type: ignore[misc] # TRL has no types
    """TRL's trainer, whose loss scores the answer's positions only.

    The loss is that of SFTTrainer (a test compares the adapters), but SFTTrainer scores
    every position and computes entropy and accuracy besides, which without Triton is
    most of a step's time for a small model with a large vocabulary.
    """

    def __init__(self, *args: Any, compress: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._compress = compress

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Return the mean loss per answer token, plus FedProx's pull."""
        with compressed_activations(model) if self._compress else nullcontext():
            losses = answer_losses(
                model, inputs["input_ids"], inputs["attention_mask"], inputs["labels"]
            )
        count = losses.numel() if num_items_in_batch is None else num_items_in_batch
        loss = losses.sum() / torch.as_tensor(count).clamp(min=1)
        # The gradients of the micro-batches of a step are summed.
        return loss + self.pull() / self.current_gradient_accumulation_steps

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Append to the history; SFTTrainer would add entropy, which is not computed."""
        self.state.log_history.append(logs)


def train_adapter(
    adapted: AdaptedModel,
    examples: Sequence[Mapping[str, Any]],
    config: TrainConfig,
    task: RoundTask,
) -> Trained:
    """Fine-tune the adapter from given values on one client's examples.

    Args:
        adapted: The resident model; its trained values are overwritten, everything else
            is left as it was.
        examples: Rows as tokens, as the objective takes them; at least one.
        config: Settings of the training.
        task: Where to start, the learning rate, the seed and the deadline.

    Raises:
        AdapterError: The task's arrays are not those of this adapter.
        ConfigError: `train.plugin` cannot be used.
        ModelError: The model has no embedding for a row's token.
        TimeLimitError: The deadline passed before the last step.
    """
    return watched_training(adapted, examples, config, task, "constant_with_warmup", [])


def watched_training(
    adapted: AdaptedModel,
    examples: Sequence[Mapping[str, Any]],
    config: TrainConfig,
    task: RoundTask,
    schedule: str,
    callbacks: Sequence[TrainerCallback],
) -> Trained:
    """Fine-tune as `train_adapter` does, by any schedule, with more callbacks.

    Args:
        adapted: As there, like the next three.
        examples: Rows.
        config: Settings of the training.
        task: Its `learning_rate` is where the schedule begins.
        schedule: Name of transformers' schedule of the learning rate.
        callbacks: Called by the trainer besides its own.

    Raises:
        AdapterError: The task's arrays are not those of this adapter.
        ConfigError: `train.plugin` cannot be used.
        ModelError: The model has no embedding for a row's token.
        TimeLimitError: The deadline passed before the last step.
    """
    model, tokenizer = adapted.model, adapted.tokenizer
    base = model.get_base_model()
    # Else the trainer logs, each round, that it aligned them.
    base.config.pad_token_id = tokenizer.pad_token_id
    base.generation_config.pad_token_id = tokenizer.pad_token_id
    # Here, and not in the step that meets the token: nothing is trained in vain.
    texts = [text for row in examples for text in texts_of(row)]
    require_known_tokens(base, torch.tensor([max(t["input_ids"]) for t in texts]))
    trained = [p for p in model.parameters() if p.requires_grad]
    plugin = load_plugin(config.plugin) if config.plugin else None
    is_callback = isinstance(plugin, TrainerCallback)
    sparing = release_mapped_pages(model) if config.gradient_checkpointing else None
    with (
        restoring(model),
        sparing or nullcontext(),
        tempfile.TemporaryDirectory(prefix="fedllm-") as folder,
    ):
        trainer = objective_of(config).make_trainer(
            adapted,
            Dataset.from_list([dict(row) for row in examples]),
            config,
            _settings(config, task, folder, model.device.type, schedule),
            None if is_callback else plugin,
        )
        trainer.remove_callback(PrinterCallback)
        clock = _Deadline(task)
        for callback in (clock, *callbacks, *([plugin] if is_callback else [])):
            trainer.add_callback(callback)
        # On a quantised base TRL's trainers round the adapter to bfloat16, whose 8 bits
        # lose small updates; ours stays in float32.
        for parameter in trained:
            parameter.data = parameter.data.float()
        adapted.set(task.arrays)
        trainer.remember_reference(trained)
        result = trainer.train()
    return Trained(
        arrays=adapted.get(),
        loss=float(result.training_loss),
        num_examples=len(examples),
        num_steps=int(trainer.state.global_step),
        began=clock.began,
        is_cut=clock.is_cut,
    )


def make_sft_trainer(
    adapted: AdaptedModel,
    examples: Dataset,
    config: TrainConfig,
    settings: dict[str, Any],
    collator: Any,
) -> AdapterTrainer:
    """Return the trainer of one client's answers.

    Args:
        adapted: The resident model.
        examples: Its rows as tokens.
        config: What is no setting of TRL's.
        settings: What TRL's trainers have in common.
        collator: Makes a batch; None: the usual one.
    """
    own = {"dataset_kwargs": {"skip_prepare_dataset": True}}
    return AdapterTrainer(
        model=adapted.model,
        args=SFTConfig(**settings, **own),
        train_dataset=examples,
        processing_class=adapted.tokenizer,
        data_collator=collator or (lambda rows: collate(rows, adapted.pad_token_id)),
        proximal_mu=config.proximal_mu,
        compress=config.activation_compression,
    )


class _Deadline(TrainerCallback):  # type: ignore[misc] # transformers has no types
    """Stop a training whose time is up, and record when its first step began."""

    def __init__(self, task: RoundTask) -> None:
        self._task = task
        self.began: float | None = None
        self.is_cut = False

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._task.check_deadline(state.global_step)
        if self.began is None:
            self._task.require_a_step()
            self.began = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        num_steps = state.global_step
        if self.began is None or num_steps == state.max_steps:
            return
        if self._task.is_last_step(num_steps, self.began):
            self.is_cut = control.should_training_stop = True


def _settings(
    config: TrainConfig,
    task: RoundTask,
    folder: str,
    device: str,
    schedule: str,
) -> dict[str, Any]:
    """Return TRL's settings, of either trainer; nothing is saved, reported or drawn."""
    return dict(
        output_dir=folder,
        per_device_train_batch_size=config.batch_size,
        gradient_accumulation_steps=config.gradient_accumulation,
        max_steps=config.local_steps if config.local_steps > 0 else -1,
        num_train_epochs=config.local_epochs if config.local_steps == 0 else 1.0,
        activation_checkpointing=config.gradient_checkpointing,
        optim="sgd" if config.optimizer == "sgd" else "adamw_torch",
        learning_rate=task.learning_rate,
        lr_scheduler_type=schedule,
        warmup_steps=config.warmup_steps,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        seed=task.seed,
        data_seed=task.seed,
        max_length=None,
        # Routers are frozen: their balance is no matter of the answer's loss.
        router_aux_loss_coef=0.0,
        # The base already computes in its own type and the adapter in float32: autocast
        # would only add casts.
        bf16=False,
        fp16=False,
        use_cpu=device == "cpu",
        remove_unused_columns=False,
        dataloader_num_workers=0,
        dataloader_pin_memory=False,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
