import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from fedllm.models import packing
from fedllm.models.attention import use_fast_gradients
from fedllm.models.packing import hidden_states


def small(model_type, **more):
    config = AutoConfig.for_model(
        model_type,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        vocab_size=64,
        **more,
    )
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(config).eval()
    use_fast_gradients(base)
    return base


def unequal_rows():
    mask = torch.ones(3, 11, dtype=torch.long)
    mask[0, 4:] = mask[2, 9:] = 0
    generator = torch.Generator().manual_seed(0)
    return torch.randint(3, 64, mask.shape, generator=generator), mask


def states_and_gradient(base, ids, mask):
    base.zero_grad()
    states = hidden_states(base, ids, mask)
    (states**2 * torch.arange(states.numel()).view_as(states)).sum().backward()
    return states.detach(), [p.grad.clone() for p in base.model.parameters()]


def calls(base):
    """Note the shapes of token ids that the model is given."""
    seen = []
    forward = base.model.forward
    base.model.forward = lambda **told: (
        seen.append(tuple(told["input_ids"].shape)),
        forward(**told),
    )[1]
    return seen


def shapes_if_equal_to_padded(base, ids, mask):
    """Compare states and gradients with and without padding; return what base was given."""
    shapes = calls(base)
    states, gradient = states_and_gradient(base, ids, mask)
    base.set_attn_implementation("sdpa")
    padded, padded_gradient = states_and_gradient(base, ids, mask)
    torch.testing.assert_close(states, padded, rtol=1e-4, atol=1e-5)
    for one, other in zip(gradient, padded_gradient, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4 * other.abs().max())
    return shapes


@pytest.mark.parametrize("model_type", packing.MODEL_TYPES)
def test_a_batch_without_padding_gives_what_a_padded_one_gives(model_type):
    ids, mask = unequal_rows()
    base = small(
        model_type, **({"sliding_window": None} if model_type == "mistral" else {})
    )
    assert shapes_if_equal_to_padded(base, ids, mask) == [(1, 24), (3, 11)]


def test_a_window_shorter_than_the_rows_keeps_its_padding():
    ids, mask = unequal_rows()
    base = small("mistral", sliding_window=3)
    shapes = calls(base)
    states, _ = states_and_gradient(base, ids, mask)
    base.set_attn_implementation("sdpa")
    padded, _ = states_and_gradient(base, ids, mask)
    assert shapes == [(3, 11), (3, 11)]
    torch.testing.assert_close(states, padded, rtol=1e-4, atol=1e-5)


def test_other_models_keep_their_padding():
    ids, mask = unequal_rows()
    base = small("gemma")
    shapes = calls(base)
    states_and_gradient(base, ids, mask)
    assert shapes == [(3, 11)]


def test_without_padding_a_batch_is_left_as_it_is():
    ids, mask = unequal_rows()
    base = small("llama")
    shapes = calls(base)
    states = hidden_states(base, ids, torch.ones_like(mask))
    assert shapes == [(3, 11)] and len(states) == 33


def test_in_one_row_no_token_sees_another_s_row():
    ids, mask = unequal_rows()
    base = small("llama")
    before = hidden_states(base, ids, mask)
    ids[0, 0] = ids[0, 0] % 60 + 4
    after = hidden_states(base, ids, mask)
    assert not torch.equal(before[:4], after[:4])
    assert torch.equal(before[4:], after[4:])


def rows_that_begin_alike(shared=5):
    """Three rows of 5, 11 and 9 tokens, the first no longer than what they share."""
    ids, mask = unequal_rows()
    ids[:, :shared] = ids[0, :shared]
    ids[1:, shared] = torch.tensor([3, 4])
    mask[0, :5] = 1
    return ids, mask


@pytest.mark.parametrize("model_type", packing.MODEL_TYPES)
@pytest.mark.parametrize("shared", [1, 4, 5])
def test_what_rows_begin_with_is_computed_once(model_type, shared):
    ids, mask = rows_that_begin_alike(shared)
    base = small(
        model_type, **({"sliding_window": None} if model_type == "mistral" else {})
    )
    assert shapes_if_equal_to_padded(base, ids, mask) == [(1, 25 - 2 * shared), (3, 11)]


def test_rows_that_are_equal_share_all_but_their_last_token():
    ids, mask = unequal_rows()
    ids, mask = ids[1:2].expand(3, 11), torch.ones_like(mask)
    base = small("llama")
    assert shapes_if_equal_to_padded(base, ids, mask) == [(1, 13), (3, 11)]


def test_a_token_of_one_row_changes_no_other_though_they_begin_alike():
    ids, mask = rows_that_begin_alike()
    base = small("llama")
    before = hidden_states(base, ids, mask)
    ids[1, 7] = ids[1, 7] % 60 + 4
    after = hidden_states(base, ids, mask)
    # Row 1 has places 5 to 15 of the result.
    assert not torch.equal(before[12:16], after[12:16])
    assert torch.equal(before[:12], after[:12])
    assert torch.equal(before[16:], after[16:])


def test_a_row_alone_is_left_as_it_is():
    ids, mask = unequal_rows()
    base = small("llama")
    shapes = calls(base)
    hidden_states(base, ids[1:2], mask[1:2])
    assert shapes == [(1, 11)]


def test_under_dropout_each_row_drops_values_of_its_own():
    ids, mask = rows_that_begin_alike()
    base = small("llama")
    base.model.layers[0].mlp.act_fn = torch.nn.Sequential(
        base.model.layers[0].mlp.act_fn, torch.nn.Dropout(0.5)
    )
    shapes = calls(base)
    hidden_states(base.train(), ids, mask)
    hidden_states(base.eval(), ids, mask)
    assert shapes == [(1, 25), (1, 15)]


def test_a_model_that_drops_attention_is_left_as_it_is_while_it_trains():
    ids, mask = rows_that_begin_alike()
    base = small("llama", attention_dropout=0.5)
    shapes = calls(base)
    hidden_states(base.train(), ids, mask)
    hidden_states(base.eval(), ids, mask)
    assert shapes == [(3, 11), (1, 15)]


def test_in_bfloat16_a_common_beginning_is_as_exact_as_computed_for_each_row():
    ids, mask = rows_that_begin_alike()
    base = small("llama")
    exact = states_and_gradient(base, ids, mask)[1]
    base = base.bfloat16()
    errors = []
    for implementation in ("fedllm_cpu", "sdpa"):
        base.set_attn_implementation(implementation)
        found = states_and_gradient(base, ids, mask)[1]
        pairs = zip(found, exact, strict=True)
        errors.append(sum(float((one - other).norm()) for one, other in pairs))
    assert errors[0] <= 1.2 * errors[1]


def test_a_row_that_another_one_begins_with_keeps_its_states():
    ids, mask = unequal_rows()
    ids, mask = ids[1:2].repeat(2, 1), mask[:2]
    base = small("llama")
    shapes = calls(base)
    states = hidden_states(base, ids, mask)
    base.set_attn_implementation("sdpa")
    padded = hidden_states(base, ids, mask)
    torch.testing.assert_close(states, padded, rtol=1e-4, atol=1e-5)
    assert shapes[0] == (1, 11)


def test_gradients_of_many_rows_to_their_prefix_are_rounded_once():
    lengths, shared = (3,) * 64, 5
    tokens = shared + sum(lengths)
    generator = torch.Generator().manual_seed(0)
    q, k, v, weights = (
        torch.randn(1, heads, tokens, 8, generator=generator).bfloat16()
        for heads in (4, 2, 2, 4)
    )
    packed = packing.PackedRows(shared, lengths)

    def gradient(dtype):
        leaves = [x.to(dtype).requires_grad_() for x in (q, k, v)]
        attended = packed.attend(*leaves, 8**-0.5).transpose(1, 2)
        found = torch.autograd.grad(attended, leaves, weights.to(dtype))
        return [x[0, :, :shared].double() for x in found[1:]]

    for got, exact in zip(
        gradient(torch.bfloat16), gradient(torch.float32), strict=True
    ):
        assert float((got - exact).norm() / exact.norm()) < 2**-8
