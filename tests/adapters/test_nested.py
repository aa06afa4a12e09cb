"""A node that trains the first columns alone: what it holds, sends and pays in memory."""

import numpy as np
import pytest
import torch

from fedllm.adapters.adapted_model import AdaptedModel
from fedllm.adapters.kinds import KINDS, kind_of
from fedllm.adapters.nested import train_first_columns
from fedllm.adapters.peft_model import attach
from tests.helpers.adapters import (
    IDS,
    load_base,
    load_quantised,
    logits,
    make_spec,
    random_arrays,
)

RANK, FIRST = 4, 1


def narrowed(base, spec):
    model = attach(base, spec).eval()
    rest = train_first_columns(model, spec, FIRST)
    return AdaptedModel(model, None, spec, rest=rest)


def test_values_go_in_and_out_whole_and_the_answer_is_that_of_the_whole_rank(
    tiny_llama, attached
):
    whole, spec = attached["ffa-lora"]
    nested, arrays = narrowed(load_base(tiny_llama), spec), random_arrays(spec)

    nested.set(arrays)
    AdaptedModel(whole, None, spec).set(arrays)

    got = nested.get()
    assert all((got[name] == arrays[name]).all() for name in spec.trained_shapes)
    torch.testing.assert_close(logits(nested.model), logits(whole))


@pytest.mark.parametrize("bits", [0, 4])
def test_the_gradient_is_that_of_the_first_columns_and_nothing_else_is_trained(
    tiny_llama, tmp_path, bits
):
    spec = make_spec(tiny_llama)
    arrays, gradients = random_arrays(spec), []
    for narrow in (False, True):
        base = load_quantised(tiny_llama, tmp_path, bits)
        adapted = (
            narrowed(base, spec)
            if narrow
            else AdaptedModel(attach(base, spec), None, spec)
        )
        adapted.set(arrays)
        adapted.model.train()
        adapted.model(input_ids=IDS).logits.float().square().sum().backward()
        trained = [p for p in adapted.model.parameters() if p.requires_grad]
        assert len(trained) == len(spec.trained_shapes)
        gradients.append({n: p.grad for n, p in adapted.parameters().items()})

    whole, first = gradients
    for name, gradient in first.items():
        assert gradient.shape == (spec.trained_shapes[name][0], FIRST)
        torch.testing.assert_close(gradient, whole[name][:, :FIRST])


def test_a_kind_is_nested_only_if_its_mean_over_clients_is_exact(tiny_llama):
    """Two clients of ranks 1 and 4: the mean of what they send is the mean of what they mean."""
    nested = [name for name, kind in KINDS.items() if not kind.why_not_nested]
    assert nested == ["ffa-lora"]
    assert all(kind_of(name).is_mean_exact for name in nested)

    spec = make_spec(tiny_llama, nested[0])
    small, large = random_arrays(spec, 1), random_arrays(spec, 2)
    for value in small.values():
        value[:, FIRST:] = 0
    mean = {name: (small[name] + large[name]) / 2 for name in small}

    def products(arrays):
        peft = kind_of(spec.kind).peft_arrays(spec, arrays)
        return [
            peft[name] @ peft[name.replace("lora_B", "lora_A")]
            for name in sorted(peft)
            if "lora_B" in name
        ]

    for one, two, both in zip(*map(products, (small, large, mean)), strict=True):
        np.testing.assert_allclose(both, (one + two) / 2, atol=1e-6)
