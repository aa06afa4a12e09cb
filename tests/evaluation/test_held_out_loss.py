import math

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from fedllm.adapters.adapted_model import AdaptedModel
from fedllm.adapters.peft_model import attach, set_trained
from fedllm.adapters.resolve import adapter_spec
from fedllm.config import AdapterConfig, DataConfig, TrainConfig
from fedllm.data.tokens import tokenize
from fedllm.errors import DataError
from fedllm.evaluation import held_out_loss
from fedllm.evaluation.held_out_loss import HeldOut, held_out
from fedllm.models.loading import load_tokenizer
from fedllm.training.preference_loss import collate_pairs, pair_scores
from tests.helpers.adapters import load_base, make_spec, random_arrays
from tests.helpers.clients import preferences
from tests.helpers.examples import make_examples, plain_losses


def test_the_held_out_loss_is_that_of_a_plain_loop_over_full_logits(model):
    examples = make_examples()
    wanted = plain_losses(model, examples)

    got = held_out(model, examples, 0)

    assert got.loss == pytest.approx(sum(wanted) / len(wanted), rel=1e-5)
    assert (got.num_examples, got.num_tokens) == (12, len(wanted))
    assert got.perplexity == pytest.approx(math.exp(got.loss))


def test_the_loss_goes_through_the_adapter_that_is_on(tiny_chat_llama):
    base = AutoModelForCausalLM.from_pretrained(tiny_chat_llama, dtype=torch.float32)
    spec = adapter_spec(AdapterConfig(rank=4), base.config, 5)
    tuned = attach(base, spec)
    draw = np.random.default_rng(0)
    values = {n: draw.normal(0, 1, s) for n, s in spec.trained_shapes.items()}
    set_trained(tuned, spec, values)
    examples = make_examples()
    wanted = plain_losses(tuned.eval(), examples)

    got = held_out(tuned, examples, 0)
    with tuned.disable_adapter():
        without = held_out(tuned, examples, 0)

    assert got.loss == pytest.approx(sum(wanted) / len(wanted), rel=1e-5)
    assert abs(got.loss - without.loss) > 1e-3


@pytest.mark.parametrize("pad", [0, 1, 2, 383])
def test_the_padding_id_does_not_matter_even_where_it_ends_answers(model, pad):
    examples = make_examples()
    for example in examples:
        example["input_ids"][-1] = example["labels"][-1] = 2
    wanted = plain_losses(model, examples)

    assert held_out(model, examples, pad).loss == pytest.approx(
        sum(wanted) / len(wanted), rel=1e-5
    )


def test_how_examples_are_batched_and_ordered_does_not_matter(model, monkeypatch):
    examples = make_examples()
    together = held_out(model, examples, 0)

    monkeypatch.setattr(held_out_loss, "_TOKENS_PER_BATCH", 1)
    alone = held_out(model, examples[::-1], 0)

    assert alone.loss == pytest.approx(together.loss, rel=1e-5)
    assert (alone.num_examples, alone.num_tokens) == (12, together.num_tokens)


def test_a_batch_never_holds_more_tokens_than_allowed_but_for_one_long_example(model):
    examples = [
        {"input_ids": [5] * n, "labels": [5] * n} for n in (700, 700, 700, 3000)
    ]

    sizes = [len(batch) for batch in held_out_loss._batches(examples)]

    assert sizes == [2, 1, 1]


def test_held_out_leaves_no_gradient_and_eval_mode(model):
    model.train()

    held_out(model, make_examples(2), 0)

    assert not model.training
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("labels", [[-100] * 4, [7, -100, -100, -100]])
def test_nothing_to_score_is_an_error(model, labels):
    with pytest.raises(DataError, match="no answer token"):
        held_out(model, [{"input_ids": [7, 8, 9, 10], "labels": labels}], 0)
    with pytest.raises(DataError, match="no answer token"):
        held_out(model, [], 0)


def test_a_hopeless_loss_has_an_infinite_perplexity():
    assert HeldOut(1000.0, 1, 1).perplexity == math.inf


def test_pairs_are_scored_by_their_own_loss_and_in_two_shares(
    tiny_chat_llama,
):
    spec = make_spec(tiny_chat_llama)
    tokenizer = load_tokenizer(str(tiny_chat_llama))
    model = attach(load_base(tiny_chat_llama), spec)
    adapted = AdaptedModel(model, tokenizer, spec)
    data = DataConfig(format="preference")
    examples = tokenize(preferences(), adapted.tokenizer, data, 512).examples
    train = TrainConfig(objective="dpo", dpo_beta=0.3)

    base = held_out(adapted.model, examples, 0, train)
    adapted.set(random_arrays(adapted.spec))
    got = held_out(adapted.model, examples, 0, train)
    with adapted.model.disable_adapter():
        off = held_out(adapted.model, examples, 0, train)

    inputs = collate_pairs(examples, 0)
    with torch.no_grad():
        scores = pair_scores(adapted.model, inputs, 0.3)
    assert base.loss == pytest.approx(math.log(2)) and base.preferred == 0
    assert got.loss == pytest.approx(float(scores.losses.mean()), rel=1e-4)
    assert got.preferred == float((scores.margins > 0).float().mean())
    assert got.likelier == float((scores.likelihood_margins > 0).float().mean())
    assert 0 < got.preferred < 1 and got.num_examples == len(examples)
    assert (off.loss, off.likelier) == pytest.approx((base.loss, base.likelier))
    assert got.num_tokens > 2 * len(examples)
