import types

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from fedllm.models.attention import NAME, attend, use_fast_gradients
from fedllm.models.loading import load_base

BATCH, HEADS, LENGTH, SIZE = 3, 4, 9, 8


def tensors(groups=1, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    heads = (HEADS, HEADS // groups, HEADS // groups)
    return [
        torch.randn(BATCH, count, LENGTH, SIZE, generator=generator).to(dtype)
        for count in heads
    ]


def padded_mask():
    seen = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    mask = seen.expand(BATCH, 1, LENGTH, LENGTH).clone()
    for row in range(BATCH):
        mask[row, :, :, LENGTH - row :] = False
    return mask


def as_added(mask):
    return torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)


def gradients(attend, values):
    leaves = [value.clone().requires_grad_() for value in values]
    out = attend(*leaves)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    (out * weights.to(out.dtype)).sum().backward()
    return [leaf.grad.double() for leaf in leaves]


def by_definition(mask, groups, scale=SIZE**-0.5):
    def attend(q, k, v):
        k, v = (x.repeat_interleave(groups, 1) for x in (k, v))
        scores = q @ k.transpose(-1, -2) * scale
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf)
        return (scores.softmax(-1) @ v).transpose(1, 2)

    return attend


def ours(mask, groups, **options):
    module = types.SimpleNamespace(num_key_value_groups=groups, is_causal=True)
    return lambda q, k, v: attend(module, q, k, v, mask, **options)[0]


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("kind", ["seen", "added", "causal", "everything"])
def test_gradients_are_those_of_the_definition(groups, kind):
    mask, options = padded_mask(), {}
    known = mask
    if kind == "causal":
        mask, known = None, torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    elif kind == "everything":
        mask, known, options = None, None, {"is_causal": False}
    elif kind == "added":
        mask = as_added(mask)
    values = tensors(groups)
    wanted = gradients(by_definition(known, groups), [v.double() for v in values])
    got = gradients(ours(mask, groups, **options), values)
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


def test_the_scale_is_the_model_s():
    values = tensors()
    wanted = gradients(by_definition(padded_mask(), 1, 0.9), values)
    got = gradients(ours(padded_mask(), 1, scaling=0.9), values)
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


def test_in_bfloat16_it_is_as_exact_as_torch_s_own():
    values = tensors(dtype=torch.bfloat16)
    exact = gradients(by_definition(padded_mask(), 1), [v.double() for v in values])

    def torch_s(q, k, v):
        return torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=padded_mask()
        ).transpose(1, 2)

    def error(attend):
        found = gradients(attend, values)
        pairs = zip(found, exact, strict=True)
        return sum(float((one - other).norm()) for one, other in pairs)

    assert error(ours(padded_mask(), 1)) <= 1.1 * error(torch_s)


def test_the_base_attends_so_on_a_cpu_and_answers_as_before(tiny_llama, tmp_path):
    base = load_base(str(tiny_llama), 0, tmp_path, "cpu", in_float32=True)
    ids = torch.arange(24).reshape(2, 12) % 50 + 3
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    embedded = base.get_input_embeddings()(ids)

    def step():
        leaf = embedded.clone().requires_grad_()
        out = base(inputs_embeds=leaf, attention_mask=mask)
        (out.logits[mask.bool()] ** 2).sum().backward()
        return leaf.grad

    def answer():
        return base.generate(ids[:1], max_new_tokens=8, do_sample=False, use_cache=True)

    assert base.config._attn_implementation == NAME
    backward_of = "_AttentionBackward"
    out = base(inputs_embeds=embedded.clone().requires_grad_(), attention_mask=mask)
    assert backward_of in graph(out.logits)
    with torch.no_grad():
        logits, told = base(input_ids=ids, attention_mask=mask).logits, answer()
    gradient = step()
    base.set_attn_implementation("sdpa")
    with torch.no_grad():
        assert torch.equal(logits, base(input_ids=ids, attention_mask=mask).logits)
        assert torch.equal(told, answer())
    torch.testing.assert_close(gradient, step(), rtol=1e-3, atol=1e-5)


def graph(tensor):
    names, left = set(), [tensor.grad_fn]
    while left:
        node = left.pop()
        names.add(node.name())
        left += [parent for parent, _ in node.next_functions if parent is not None]
    return names


def test_what_is_saved_of_the_base_does_not_name_it(tiny_llama, tmp_path):
    load_base(str(tiny_llama), 0, tmp_path, "cpu").save_pretrained(tmp_path)
    assert NAME not in (tmp_path / "config.json").read_text()


def test_keys_of_earlier_tokens_are_left_to_torch():
    query, key, value = tensors()
    query = query[:, :, -2:].requires_grad_()
    module = types.SimpleNamespace(is_causal=True)
    seen = torch.ones(2, LENGTH, dtype=torch.bool).tril(LENGTH - 2)
    got, _ = attend(module, query, key, value, seen)
    wanted = by_definition(seen, 1)(query, key, value)
    torch.testing.assert_close(got, wanted)
    (one,) = torch.autograd.grad(got.square().sum(), query)
    (other,) = torch.autograd.grad(wanted.square().sum(), query)
    torch.testing.assert_close(one, other)


def test_a_model_with_attention_of_its_own_keeps_it():
    config = AutoConfig.for_model(
        "llama", hidden_size=8, num_attention_heads=1, num_hidden_layers=1, vocab_size=8
    )
    base = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    use_fast_gradients(base)
    assert base.config._attn_implementation == "eager"
