"""Our ways through a model are used where they agree with the library's, and not elsewhere."""

import logging
from typing import Any

import pytest
import torch

from fedllm.errors import ModelError
from fedllm.models import attention, packing
from fedllm.models.answer_loss import answer_losses, collate
from fedllm.models.fast_paths import FastPaths, fast_paths
from tests.helpers.architecture_checks import examples
from tests.helpers.architectures import ARCHITECTURES

MODELS = {architecture.name: architecture for architecture in ARCHITECTURES}


def make(name: str = "Llama") -> Any:
    model = MODELS[name].model()
    attention.use_fast_gradients(model)
    return model


def test_a_model_that_agrees_keeps_all_our_ways():
    model = make()

    assert fast_paths(model) == FastPaths(head=True, packing=True)
    assert model.config._attn_implementation == attention.NAME


@pytest.mark.parametrize("name", ["Gemma 2", "Cohere", "Granite"])
def test_a_head_that_caps_or_scales_its_scores_is_left_to_the_library(name, caplog):
    model = make(name)

    with caplog.at_level(logging.INFO, logger="fedllm"):
        assert not fast_paths(model).head
        fast_paths(model)

    assert [r.message.split(" differs")[0] for r in caplog.records] == [
        "answer loss in parts"
    ]


def test_attention_that_differs_gives_way_to_the_library_s(monkeypatch, caplog):
    ours = attention.attend

    def off(*args: Any, **options: Any) -> Any:
        result, weights = ours(*args, **options)
        return result * 1.001, weights

    monkeypatch.setattr(attention, "attend", off)
    model = make()

    with caplog.at_level(logging.INFO, logger="fedllm"):
        paths = fast_paths(model)

    assert paths == FastPaths(head=True, packing=False)
    assert model.config._attn_implementation == "sdpa"
    assert caplog.records[0].message.startswith("attention differs from transformers'")


def test_attention_whose_gradient_alone_differs_gives_way_too(monkeypatch):
    class Off(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, *gradients: Any) -> Any:
            return gradients[0] * 1.001

    ours = attention.attend
    monkeypatch.setattr(
        attention,
        "attend",
        lambda *args, **options: (Off.apply(ours(*args, **options)[0]), None),
    )
    model = make()

    fast_paths(model)

    assert model.config._attn_implementation == "sdpa"


def test_packing_that_lets_rows_see_each_other_is_not_used(monkeypatch):
    honest = packing.PackedRows

    def one_row(num_shared: int, lengths: tuple[int, ...]) -> Any:
        return honest(num_shared, (sum(lengths),))

    monkeypatch.setattr(packing, "PackedRows", one_row)

    assert fast_paths(make()) == FastPaths(head=True, packing=False)


def test_the_trial_is_made_once_and_leaves_the_model_as_it_was():
    model = make().train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    calls: list[int] = []
    model.register_forward_hook(lambda *_: calls.append(1))

    with torch.inference_mode():
        fast_paths(model)
    fast_paths(model)

    assert len(calls) == 1
    assert [module.training for module in model.modules()] == modes
    hooks = [m for m in model.modules() if m is not model and m._forward_hooks]
    assert hooks == []
    # What the trial made in inference mode can still be trained.
    answer_losses(model, **collate(examples(), 0)).mean().backward()


def test_a_model_that_the_library_itself_cannot_run_is_one_line():
    model = make("Mamba")
    mixer = model.backbone.layers[0].mixer
    weight = mixer.dt_proj.weight.data.to(torch.int8)
    mixer.dt_proj.weight = torch.nn.Parameter(weight, requires_grad=False)

    with pytest.raises(ModelError, match="own forward pass fails") as caught:
        fast_paths(model)
    assert "\n" not in str(caught.value)
