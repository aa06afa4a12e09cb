"""The result of a training, and the clean-up of the model after it."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fedllm.adapters.spec import Arrays

if TYPE_CHECKING:
    from peft import PeftModel


_ROUTING = ("output_router_logits", "router_aux_loss_coef")
"""Settings of a mixture of experts that SFTTrainer overwrites."""
_RECORDS = "_output_capturing_hooks_installed"
"""transformers' mark on a model whose modules have the hooks by which it records outputs."""


@dataclass(frozen=True)
class Trained:
    """The result of one client's training in one round.

    Attributes:
        arrays: The trained values afterwards.
        loss: Mean training loss over the steps, in nats per answer token; NaN under
            `privacy.unit="record"`, since it depends on the rows without noise.
        num_examples: Examples that the client holds.
        num_steps: Optimiser steps taken.
        began: `time.monotonic()` when the first step began; None if not recorded.
        is_cut: Whether the node's own limit of time ended it before its last step.
        num_unfit: Under `privacy.unit="record"`, examples that the model could not take,
            counted at each draw; for the client's own log.
    """

    arrays: Arrays
    loss: float
    num_examples: int
    num_steps: int
    began: float | None = None
    num_unfit: int = 0
    is_cut: bool = False


@contextlib.contextmanager
def restoring(model: "PeftModel") -> Iterator[None]:
    """Restore a resident model when a training ends, also if it fails.

    Every SFTTrainer wraps `forward` once more and never unwraps it: after a thousand
    trainings that would be a RecursionError. With checkpointing it leaves checkpointing on,
    and one more hook on the embedding for each trainer that was built. On a mixture of
    experts it leaves the output of the routers switched on in the configuration.
    """
    base = model.get_base_model()
    forward = base.__dict__.get("forward")
    text_config = base.config.get_text_config()
    routing = {name: vars(text_config).get(name) for name in _ROUTING}
    recording = {m for m in model.modules() if _RECORDS in vars(m)}
    hooks = {m: dict(m._forward_hooks) for m in model.modules() if m._forward_hooks}
    try:
        yield
    finally:
        base.__dict__.pop("forward", None)
        if forward is not None:
            base.__dict__["forward"] = forward
        if base.is_activation_checkpointing:
            base.activation_checkpointing_disable()
        for module in model.modules():
            for key in set(module._forward_hooks) - set(hooks.get(module, {})):
                del module._forward_hooks[key]
            if module not in recording:
                # transformers would take the hooks by which it records to be there.
                vars(module).pop(_RECORDS, None)
        for name, value in routing.items():
            if name in vars(text_config):
                setattr(text_config, name, value)
        model.zero_grad(set_to_none=True)
        model.eval()
