"""Per-example gradients of the adapter's trained values.

For a linear layer y = x W^T an example's gradient of W is a product over its own tokens,
sum over t of g_t x_t^T, with g the gradient of y: one batched pass over a micro-batch
gives all of them (Goodfellow 2015, arXiv 1510.01799). The base is passed through in any
precision. If a trained value is not a linear layer's weight, each example gets a pass of its
own, which is right for any model.

A gradient has to depend on its example alone, to the last bit. In bfloat16 the shape of a
batch, that is the other examples, changed it by 6 %, and such changes in all rows of a batch
are part of its sensitivity. So a micro-batch is always full, its length is a function of
each of its examples, nothing is masked, and the head runs on one example.

That was seen to hold bit for bit on a CPU, for the models of `MODEL_TYPES`. On the device in
use it is tried first, on public tokens. All other models, and lengths that fail the trial, get
one example a pass. A mixture of experts, for instance, multiplies the tokens
that chose an expert together, whosesoever they are, and no short trial would show it.
"""

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from itertools import groupby
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch

from fedllm.models.answer_loss import collate
from fedllm.models.fast_paths import fast_paths
from fedllm.models.limits import num_embeddings

if TYPE_CHECKING:
    from peft import PeftModel


logger = logging.getLogger(__name__)

# Each computes a token of an example from that example's tokens alone;
# tests/training/test_per_example_gradients.py tries each.
MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")

_LENGTH_STEP = 16
"""Examples are padded to the next multiple of this many tokens."""

# What was found on the device: model -> (padded length, size of a micro-batch) -> found.
_trials: WeakKeyDictionary[Any, dict[tuple[int, int], bool]] = WeakKeyDictionary()


class _NotByExampleError(Exception):
    """A layer got an input whose first dimension is not the example."""


class _Tap(torch.autograd.Function):
    """The identity, which hands a layer's input and output gradient to a sink.

    The input is saved as autograd saves it, so checkpointing still frees it.
    """

    @staticmethod
    def forward(ctx: Any, output: Any, x: Any, sink: Any) -> Any:
        ctx.save_for_backward(x)
        ctx.sink = sink
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (x,) = ctx.saved_tensors
        ctx.sink(x.detach(), gradients[0])
        return gradients[0], None, None


class PerExample:
    """Per-example gradients of a model's trained parameters.

    Attributes:
        trained: The parameters that require a gradient, in the model's order.
        num_tokens: How many tokens the model has an embedding for.
        num_unfit: Examples so far, counted at each draw, that the model could not take.

    Args:
        model: The base model with the adapter on it, in the mode of the training.
        pad_token_id: Any token id.

    Raises:
        ModelError: transformers' own forward fails on this model.
    """

    def __init__(self, model: "PeftModel", pad_token_id: int) -> None:
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self._model = model
        self._pad_token_id = pad_token_id
        self._device = next(model.parameters()).device
        self._layers = _linear_layers(model, self.trained)
        self.num_tokens = num_embeddings(model.get_base_model())
        self._has_plain_head = fast_paths(model.get_base_model()).head
        self._by_layers = (
            getattr(model.config, "model_type", None) in MODEL_TYPES
            and len(self._layers) == len(self.trained)
            and self._has_plain_head
        )
        self.num_unfit = 0

    def gradients(
        self, examples: Sequence[Mapping[str, Any]], micro_batch_size: int
    ) -> Iterator[torch.Tensor]:
        """Yield every example's gradient, a micro-batch at a time.

        Args:
            examples: Rows with `input_ids` and `labels`; may be empty.
            micro_batch_size: Examples in one pass; memory grows with it.

        Yields:
            (b, d) float32 on the CPU: one row an example, examples sorted by length,
            values in the order of `trained`.

        Guarantee:
            A row is the gradient of the mean loss over its example's own answer tokens,
            whatever the other examples are, bit for bit: one pass serves several examples
            only of models that were seen to keep them apart, and after a trial on this
            device. NaN in one row stays in that row. An example that the model cannot
            take has no row, and `num_unfit` counts it.
        """
        fit = [example for example in examples if self._fits(example)]
        self.num_unfit += len(examples) - len(fit)
        ordered = sorted(fit, key=lambda row: len(row["input_ids"]))
        for length, alike in groupby(ordered, key=_padded_length):
            together = self._keeps_apart(length, micro_batch_size)
            for batch in _chunks(list(alike), micro_batch_size):
                if together:
                    try:
                        full = batch + batch[-1:] * (micro_batch_size - len(batch))
                        yield self._pass(full)[: len(batch)]
                        continue
                    except _UNFIT as error:
                        _raise_if_of_memory(error)
                for example in batch:
                    yield from self._alone(example, micro_batch_size, together)

    def _keeps_apart(self, length: int, size: int) -> bool:
        """Return whether one pass may serve several examples of a padded length.

        A function of model, device, length and size, and of no example: one example more
        may not change how the others are computed. An accelerator chooses kernels by the
        length, so there each length is tried; on a CPU, where a pass is dear and the tests
        compare many lengths, the shortest stands for all. A process tries each but once.
        """
        if not self._by_layers:
            return False
        if self._device.type == "cpu":
            length = _LENGTH_STEP
        tried = _trials.setdefault(self._model, {})
        if (length, size) not in tried:
            tried[length, size] = self._try(length, size)
            if not tried[length, size]:
                logger.info(
                    "gradients of examples differ with their company on this device, so "
                    "each gets a pass of its own: slower, and as private"
                )
        return tried[length, size]

    def _try(self, length: int, size: int) -> bool:
        """Return whether public examples have the same bits at another place, in other company."""
        batch = [public_example(i, length, self.num_tokens) for i in range(2 * size)]
        half = (size + 1) // 2
        try:
            among = self._pass(batch[:size])
            # The later half moves to the front, the other way round, beside new examples.
            moved = self._pass(batch[size - half : size][::-1] + batch[size + half :])
        except _NotByExampleError:
            return False
        except _UNFIT as error:
            _raise_if_of_memory(error)
            return False
        return torch.equal(among[size - half :], moved[:half].flip(0))

    def _fits(self, example: Mapping[str, Any]) -> bool:
        """Return whether the model has an example's tokens and, if bounded, positions.

        On an accelerator a token that it lacks would end the process.
        """
        config = self._model.get_base_model().config.get_text_config()
        most = getattr(config, "max_position_embeddings", None)
        if config.model_type in MODEL_TYPES or not isinstance(most, int):
            most = math.inf
        return max(example["input_ids"]) < self.num_tokens and (
            _padded_length(example) <= most
        )

    def _alone(
        self, example: Mapping[str, Any], size: int, together: bool
    ) -> Iterator[torch.Tensor]:
        """Yield one example's gradient, or nothing if the model cannot take it.

        If one pass serves several, a batch of copies gives the bits that any company would
        have given.
        """
        try:
            if together:
                yield self._pass([example] * size)[:1]
            else:
                yield self._one(example)
        except _UNFIT as error:
            _raise_if_of_memory(error)
            self._model.zero_grad(set_to_none=True)
            self.num_unfit += 1

    def _one(self, example: Mapping[str, Any]) -> torch.Tensor:
        """Return one example's gradient, (1, d), from autograd alone."""
        self._model.zero_grad(set_to_none=True)
        self._backward([example])
        rows = [
            (torch.zeros_like(p) if p.grad is None else p.grad).reshape(1, -1)
            for p in self.trained
        ]
        self._model.zero_grad(set_to_none=True)
        return torch.cat([row.float().cpu() for row in rows], 1)

    def _pass(self, batch: Sequence[Mapping[str, Any]]) -> torch.Tensor:
        """Return the gradients of a micro-batch, (b, d), from one pass."""
        rows = {
            p: torch.zeros(len(batch), *p.shape, dtype=torch.float32, device=p.device)
            for p in self.trained
        }
        with ExitStack() as stack:
            for parameter, (layer, left) in self._layers.items():
                hook = _tap_hook(rows[parameter], left)
                stack.callback(layer.register_forward_hook(hook).remove)
            try:
                self._backward(batch)
            finally:
                self._model.zero_grad(set_to_none=True)
        return torch.cat([rows[p].flatten(1).cpu() for p in self.trained], 1)

    def _backward(self, batch: Sequence[Mapping[str, Any]]) -> None:
        """Run the backward pass of the sum over examples of each one's mean answer loss."""
        inputs = collate(batch, self._pad_token_id)
        # Every answer comes before the padding, and no token looks ahead: nothing needs
        # a mask, and without one attention takes the same kernel for every batch.
        extra = _padded_length(batch[0]) - inputs["input_ids"].shape[1]
        pad = torch.nn.functional.pad
        ids = pad(inputs["input_ids"], (0, extra), value=self._pad_token_id)
        targets = pad(inputs["labels"], (0, extra), value=-100)[:, 1:].to(self._device)
        base: Any = self._model.get_base_model()
        if not self._has_plain_head:
            scores = base(input_ids=ids.to(self._device), use_cache=False).logits
            losses = map(_mean_loss, scores[:, :-1], targets)
            torch.autograd.backward(torch.stack(list(losses)).sum())
            return
        head = base.get_output_embeddings()
        hidden = base.base_model(
            input_ids=ids.to(self._device), use_cache=False
        ).last_hidden_state
        gradient = torch.zeros_like(hidden)
        for row, target in enumerate(targets):
            chosen = target != -100
            states = hidden[row, :-1][chosen].detach().requires_grad_()
            loss = _mean_loss(head(states), target[chosen])
            (back,) = torch.autograd.grad(loss, states)
            gradient[row, :-1][chosen] = back
        hidden.backward(gradient)


def _mean_loss(scores: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the mean loss of the targets that are not -100; 0 if there are none."""
    total = torch.nn.functional.cross_entropy(
        scores.float(), targets, reduction="sum", ignore_index=-100
    )
    return total / (targets != -100).sum().clamp(min=1)


# A token or a position that the model does not have, among others.
_UNFIT = (IndexError, ValueError, RuntimeError)


def _raise_if_of_memory(error: Exception) -> None:
    """Raise an error again that is about this machine, and not about an example."""
    is_cpu = "DefaultCPUAllocator" in str(error)
    if is_cpu or isinstance(error, torch.OutOfMemoryError):
        raise error


def public_example(index: int, length: int, vocabulary: int) -> dict[str, list[int]]:
    """Return tokens that depend on no data, as many as are padded to `length`."""
    size = length - index % (_LENGTH_STEP - 4)
    tokens = [
        (7 + 31 * index + 17 * place * place) % vocabulary for place in range(size)
    ]
    start = 1 + index % 3
    return {"input_ids": tokens, "labels": [-100] * start + tokens[start:]}


def _padded_length(example: Mapping[str, Any]) -> int:
    """Return the length that an example is padded to, a function of it alone."""
    return -(-len(example["input_ids"]) // _LENGTH_STEP) * _LENGTH_STEP


def _chunks(
    examples: list[Mapping[str, Any]], size: int
) -> Iterator[list[Mapping[str, Any]]]:
    """Yield pieces of a list; the last may be shorter."""
    for start in range(0, len(examples), size):
        yield examples[start : start + size]


def _linear_layers(
    model: torch.nn.Module, trained: Sequence[torch.nn.Parameter]
) -> dict[torch.nn.Parameter, tuple[torch.nn.Module, torch.Tensor | None]]:
    """Return the linear layer whose weight, left @ weight or first columns each parameter is."""
    trained_set = set(trained)
    layers: dict[torch.nn.Parameter, tuple[torch.nn.Module, torch.Tensor | None]] = {}
    for module in model.modules():
        if not isinstance(module, torch.nn.Linear):
            continue
        left = None
        weight: Any = dict(module.named_parameters(recurse=False)).get("weight")
        chain = getattr(module, "parametrizations", None)
        if chain is not None and "weight" in chain:
            weight = chain.weight.original if len(chain.weight) == 1 else None
            left = getattr(chain.weight[0], "left", None)
            if left is None and not hasattr(chain.weight[0], "rest"):
                continue
        if weight is not None and weight in trained_set:
            if weight in layers:
                # Two layers share it: each would give a part of the gradient.
                return {}
            layers[weight] = (module, left)
    return layers


def _tap_hook(rows: torch.Tensor, left: torch.Tensor | None) -> Any:
    """Return the forward hook that adds a layer's per-example gradients to `rows`.

    Args:
        rows: (b, out, in), or (b, r, in) if the weight is left (out, r) @ core; of a weight
            whose first columns are trained, those.
        left: The fixed left factor of a core.
    """

    def add(x: torch.Tensor, gradient: torch.Tensor) -> None:
        if left is not None:
            gradient = gradient @ left
        # Everything between the example and the last dimension is summed over.
        one, two = gradient.float().flatten(1, -2), x.float().flatten(1, -2)
        two = two[..., : rows.shape[-1]]
        rows.add_(torch.bmm(one.transpose(1, 2), two))

    def hook(module: Any, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> Any:
        if not torch.is_grad_enabled():
            return None
        x = args[0]
        if x.dim() < 3 or x.shape[0] != len(rows):
            raise _NotByExampleError
        return _Tap.apply(output, x, add)  # type: ignore[no-untyped-call]

    return hook
