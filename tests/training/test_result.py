"""A training leaves the model as it was."""

from typing import Any

import pytest
import torch

from fedllm.adapters.peft_model import attach
from fedllm.adapters.resolve import adapter_spec
from fedllm.config import AdapterConfig
from fedllm.errors import AdapterError
from fedllm.training import sft
from fedllm.training.result import restoring
from tests.helpers.architectures import ARCHITECTURES
from tests.helpers.clients import assert_same


def test_a_resident_model_is_left_as_it_was_however_often_it_trains(make_client):
    client = make_client(kind="lora")
    ids = torch.arange(3, 19)[None]
    with torch.no_grad(), client.model.disable_adapter():
        before = client.model(input_ids=ids).logits

    results = [client.train(seed=seed) for seed in (1, 2, 3, 1)]

    patched = [n for n, m in client.model.named_modules() if "forward" in m.__dict__]
    assert patched == []
    assert not client.model.training
    assert all(p.grad is None for p in client.model.parameters())
    with torch.no_grad(), client.model.disable_adapter():
        after = client.model(input_ids=ids).logits
    assert torch.equal(before, after)
    assert_same(results[0].arrays, results[3].arrays, atol=0)


def test_a_forward_that_was_there_before_is_put_back(make_client):
    client = make_client()
    base = client.model.get_base_model()
    plain = base.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        return plain(*args, **kwargs)

    base.forward = forward
    client.train()

    assert base.forward is forward


def test_a_training_that_fails_leaves_the_forward_as_it_was(make_client, monkeypatch):
    client = make_client()

    with pytest.raises(AdapterError):
        client.train(arrays={})
    assert "forward" not in client.model.get_base_model().__dict__

    def fail(*args: Any, **kwargs: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(sft, "answer_losses", fail)
    with pytest.raises(MemoryError):
        client.train()
    assert "forward" not in client.model.get_base_model().__dict__
    assert not client.model.training


def test_a_mixture_of_experts_records_its_routers_after_a_training_as_before():
    architecture = next(a for a in ARCHITECTURES if a.name == "Mixtral")
    base = architecture.model()
    model = attach(base, adapter_spec(AdapterConfig(rank=2), base.config, 0))
    ids = torch.arange(3, 19)[None]
    for _ in range(2):
        with restoring(model):
            base.config.output_router_logits = True
            base.config.router_aux_loss_coef = 0.0
            model(input_ids=ids)

        assert base.config.output_router_logits is False
        assert base.config.router_aux_loss_coef == 0.001
        asked = model(input_ids=ids, output_router_logits=True)
        assert len(asked.router_logits) == 2
