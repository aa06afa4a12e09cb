"""Random examples, and their losses by a plain loop."""

from typing import Any

import numpy as np
import torch


def make_examples(count: int = 12, seed: int = 0) -> list[dict[str, Any]]:
    """Return examples of uneven length, some with a gap in the answer."""
    draw = np.random.default_rng(seed)
    examples = []
    for _ in range(count):
        size = int(draw.integers(4, 40))
        ids = draw.integers(2, 384, size).tolist()
        start = int(draw.integers(1, size))
        labels = [-100] * start + ids[start:]
        if size - start > 3:
            labels[start + 1] = -100
        examples.append({"input_ids": ids, "labels": labels})
    return examples


def plain_losses(model: Any, examples: list[dict[str, Any]]) -> list[float]:
    """Score answer tokens one example at a time, from the full logits."""
    losses = []
    for example in examples:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([example["input_ids"]])).logits[0]
        scores = torch.log_softmax(logits.double(), -1)
        for place, label in enumerate(example["labels"]):
            if label != -100:
                losses.append(-float(scores[place - 1, label]))
    return losses
