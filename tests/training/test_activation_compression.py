"""What compressed activations weigh, and what they do to gradients."""

import weakref

import pytest
import torch

from fedllm.training import activation_compression
from fedllm.training.activation_compression import compressed_activations


class Chain(torch.nn.Module):
    """Keeps one activation a step, which two operators save."""

    def __init__(self, steps):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(64, 64) / 4, requires_grad=False)
        self.start = torch.nn.Parameter(torch.ones(64))
        self.steps = steps
        self.kept = []

    def forward(self, x):
        x = x * self.start
        for _ in range(self.steps):
            x = torch.tanh(x @ self.weight.T)
            self.kept.append(weakref.ref(x.untyped_storage()))
            x = x * x
        return x


def gradient(model, x, compress):
    if compress:
        with compressed_activations(model):
            loss = model(x).sum()
    else:
        loss = model(x).sum()
    model.start.grad = None
    loss.backward()
    return loss.detach(), model.start.grad.clone()


def error(got, wanted):
    return ((got - wanted).norm() / wanted.norm()).item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loss_is_exact_and_the_gradient_near(dtype):
    torch.manual_seed(0)
    model, x = Chain(3).to(dtype), torch.randn(100, 64, dtype=dtype)

    loss, exact = gradient(model, x, compress=False)
    same, near = gradient(model, x, compress=True)

    assert torch.equal(loss, same)
    assert 1e-5 < error(near.float(), exact.float()) < 0.05


def test_each_activation_is_compressed_once_and_let_go_of_and_no_weight(monkeypatch):
    torch.manual_seed(0)
    model, x = Chain(4), torch.randn(100, 64)
    compressed = []
    real = activation_compression.quantize_blockwise
    monkeypatch.setattr(
        activation_compression,
        "quantize_blockwise",
        lambda t, **kw: compressed.append(tuple(t.shape)) or real(t, **kw),
    )

    with compressed_activations(model):
        result = model(x).sum()

    assert compressed == [(100, 64)] * (1 + model.steps)
    assert not any(kept() for kept in model.kept)
    result.backward()


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x,
        lambda x: x.transpose(0, 1),
        lambda x: x.reshape(4, 32, 64).permute(1, 2, 0),
        lambda x: x[:, ::2],
        lambda x: x[:1].expand(128, 64),
        lambda x: x[:8],
    ],
)
def test_any_layout_comes_back(view):
    torch.manual_seed(0)
    source = torch.randn(128, 64, requires_grad=True)
    given = view(source * 1.0)
    with compressed_activations(torch.nn.Module()):
        result = given.square()
    (got,) = torch.autograd.grad(result.sum(), given)

    assert got.shape == given.shape and got.dtype == given.dtype
    assert error(got, 2 * given.detach()) < 0.03


def test_tensors_that_are_not_finite_are_saved_as_they_are():
    given = torch.ones(64, 64, requires_grad=True)
    mask = torch.zeros(64, 64)
    mask[0, 0] = -torch.inf
    with compressed_activations(torch.nn.Module()):
        result = (given * mask).sum()
    (got,) = torch.autograd.grad(result, given)

    assert torch.equal(got, mask)


def test_a_value_that_changed_in_place_is_compressed_anew():
    given = torch.full((64, 64), 2.0, requires_grad=True)
    buffer = torch.full((64, 64), 3.0)
    with compressed_activations(torch.nn.Module()):
        first = given * buffer
        buffer.fill_(5.0)
        second = given * buffer
    (got,) = torch.autograd.grad((first + second).sum(), given)

    assert torch.allclose(got, torch.full((64, 64), 8.0), rtol=0.02)
