"""What every way of training an adapter shares: its result, and a model left clean."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fedllm.adapters.spec import Arrays

if TYPE_CHECKING:
    from peft import PeftModel


@dataclass(frozen=True)
class Trained:
    """What one client made in one round.

    Attributes:
        arrays: The trained values afterwards.
        loss: Mean training loss over the steps, in nats per answer token; NaN under
            `privacy.unit="record"`, where nobody may know it.
        num_examples: Examples that the client holds.
        num_steps: Optimiser steps taken.
        began: `time.monotonic()` when the first step began; None where not noted.
    """

    arrays: Arrays
    loss: float
    num_examples: int
    num_steps: int
    began: float | None = None


@contextlib.contextmanager
def restoring(model: "PeftModel") -> Iterator[None]:
    """Undo what a trainer leaves on a resident model, whatever happens.

    Every SFTTrainer wraps `forward` once more and never unwraps it: after a thousand
    trainings that would be a RecursionError. With checkpointing it leaves that on, and a
    hook on the embedding for each time that it was built.
    """
    base = model.get_base_model()
    forward = base.__dict__.get("forward")
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
        model.zero_grad(set_to_none=True)
        model.eval()
