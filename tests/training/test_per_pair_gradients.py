"""The gradient of a pair is that of its own loss, and of nothing beside it."""

from typing import Any

import numpy as np
import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer

from fedllm.auditing.harness import ZeroNoise
from fedllm.config import PrivacyConfig, RunConfig, TrainConfig
from fedllm.data.tokens import texts_of
from fedllm.privacy.record_ledger import RecordPlan
from fedllm.training import dp_sgd
from fedllm.training.dp_sgd import clipped_sum, train_privately
from fedllm.training.per_pair_gradients import PerPair
from fedllm.training.task import RoundTask
from tests.helpers.clients import Client, Make, preferences
from tests.training.test_dpo import plain_dpo, with_pairs

BETA = 0.3


@pytest.fixture(scope="module")
def client(make_client: Make) -> Client:
    client = with_pairs(make_client())
    client.set(client.start())
    client.model.train()
    return client


def gradients(client: Client, pairs: list[dict[str, Any]]) -> list[torch.Tensor]:
    per_pair = PerPair(client.model, client.pad_token_id, BETA)
    found = list(per_pair.gradients(pairs, 4))
    assert all(rows.shape[0] == 1 for rows in found)
    return [rows[0] for rows in found]


@pytest.mark.parametrize("kind", ["ffa-lora", "lora-core", "ia3", "vera"])
def test_a_pairs_gradient_is_that_of_trls_loss_on_it_alone(
    make_client, tiny_chat_llama, tmp_path, kind
):
    theirs, ours = with_pairs(make_client(kind)), with_pairs(make_client(kind))
    trainer, _ = plain_dpo(theirs, tiny_chat_llama, tmp_path, max_steps=1)
    for one in (theirs, ours):
        one.set(one.start())
        one.model.train()

    got = gradients(ours, ours.examples)

    rows = [trainer.train_dataset[i] for i in range(len(preferences()))]
    for row, gradient in zip(rows, got, strict=True):
        theirs.model.zero_grad(set_to_none=True)
        trainer.compute_loss(theirs.model, trainer.data_collator([row])).backward()
        parameters = (p for p in theirs.model.parameters() if p.requires_grad)
        wanted = torch.cat([p.grad.flatten() for p in parameters])
        torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-6)
        assert wanted.norm() > 1e-3


def test_the_sum_of_a_batch_is_that_of_a_plain_loop_with_trls_loss(
    client, make_client, tiny_chat_llama, tmp_path
):
    """Through the clipped sum that DP-SGD noises, with a norm that clips nothing."""
    theirs = with_pairs(make_client())
    trainer, _ = plain_dpo(theirs, tiny_chat_llama, tmp_path, max_steps=1)
    theirs.set(theirs.start())
    theirs.model.train()
    per_pair = PerPair(client.model, client.pad_token_id, BETA)

    total = clipped_sum(per_pair, client.examples, 4, 1e3, 1e-3).total()

    theirs.model.zero_grad(set_to_none=True)
    for i in range(len(client.examples)):
        inputs = trainer.data_collator([trainer.train_dataset[i]])
        trainer.compute_loss(theirs.model, inputs).backward()
    parameters = (p for p in theirs.model.parameters() if p.requires_grad)
    wanted = torch.cat([p.grad.flatten() for p in parameters]).numpy()
    np.testing.assert_allclose(total, wanted, rtol=1e-3, atol=1e-4)


def test_company_does_not_change_a_bit_of_a_pairs_gradient(client):
    pairs = client.examples

    alone = [gradients(client, [pair])[0] for pair in pairs]
    among = gradients(client, pairs[::-1])[::-1]

    assert all(torch.equal(*both) for both in zip(alone, among, strict=True))
    assert not torch.equal(alone[0], alone[1])


def test_the_reference_is_the_base_and_sees_the_pair_alone(client):
    gradients(
        client, client.examples[:1]
    )  # The model's first use is a trial of its own.
    seen: list[tuple[bool, list[int]]] = []
    base = client.model.get_base_model()
    layer = next(m for m in base.modules() if isinstance(m, BaseTunerLayer))
    hook = base.base_model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(
            (layer.disable_adapters, kwargs["input_ids"].tolist()[0])
        ),
        with_kwargs=True,
    )
    try:
        gradients(client, client.examples[2:3])
    finally:
        hook.remove()

    texts = [text["input_ids"] for text in texts_of(client.examples[2])]
    assert seen == [(True, ids) for ids in texts] + [(False, ids) for ids in texts]


def test_a_pair_that_the_model_cannot_take_has_no_row_and_is_counted(client):
    broken = client.examples[0] | {"rejected_ids": [10**6] * 5}
    per_pair = PerPair(client.model, client.pad_token_id, BETA)

    found = list(per_pair.gradients([broken, client.examples[1]], 4))

    assert (len(found), per_pair.num_unfit) == (1, 1)


def test_only_what_is_trained_requires_a_gradient_afterwards(client):
    needs = [p.requires_grad for p in client.model.parameters()]

    gradients(client, client.examples[:1])

    assert [p.requires_grad for p in client.model.parameters()] == needs


@pytest.fixture
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the sum of a batch leave as it is."""
    monkeypatch.setattr(dp_sgd, "SecureGenerator", ZeroNoise)


def test_a_record_level_step_moves_against_the_gradients_of_all_pairs(client, quiet):
    train = TrainConfig(objective="dpo", dpo_beta=BETA, learning_rate=1.0)
    privacy = PrivacyConfig(unit="record", max_grad_norm=1e3)
    config = RunConfig(train=train, privacy=privacy)
    plan = RecordPlan(1e-9, 1.0, 1, len(client.examples), 1e-5)
    start = client.start()

    got = train_privately(client, client.examples, config, plan, RoundTask(start, 1.0))

    client.set(start)
    client.model.train()
    mean = torch.stack(gradients(client, client.examples)).mean(0)
    names = {id(p): name for name, p in client.parameters().items()}
    first = 0
    for parameter in (p for p in client.model.parameters() if p.requires_grad):
        name = names[id(parameter)]
        part = mean[first : first + parameter.numel()].view(parameter.shape)
        first += parameter.numel()
        moved = start[name] - got.arrays[name]
        np.testing.assert_allclose(moved, part.numpy(), rtol=1e-3, atol=1e-5)


def test_persons_of_several_pairs_are_clipped_as_one(client):
    per_pair = PerPair(client.model, client.pad_token_id, BETA)
    person = tuple(client.examples[:3])

    total = clipped_sum(per_pair, [person], 4, 0.01, 1e-3).total()

    summed = torch.stack(gradients(client, list(person))).sum(0).double()
    assert np.linalg.norm(total) == pytest.approx(0.01, rel=1e-3)
    wanted = (summed / summed.norm() * 0.01).numpy()
    np.testing.assert_allclose(total, wanted, atol=1e-5)


def test_the_librarys_own_forward_gives_the_same_gradient(client):
    """A head that caps or scales its scores is no product with the output layer."""
    per_pair = PerPair(client.model, client.pad_token_id, BETA)
    plain = next(iter(per_pair.gradients(client.examples[:1], 1)))

    per_pair._has_plain_head = False
    whole = next(iter(per_pair.gradients(client.examples[:1], 1)))

    torch.testing.assert_close(whole, plain, rtol=1e-4, atol=1e-6)
