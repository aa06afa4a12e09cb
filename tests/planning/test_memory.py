"""Memory that is computed from a configuration is that of the model itself."""

import pytest

from fedllm.config_parsing import parse_run_config
from fedllm.models.loading import load_base
from fedllm.models.location import load_config
from fedllm.planning.memory import memory_need


def total_bytes(model):
    tensors = {t.data_ptr(): t for t in [*model.parameters(), *model.buffers()]}
    return sum(t.numel() * t.element_size() for t in tensors.values())


def needed(tiny_llama, **changes):
    typed = {key.replace("__", ".").replace("_", "-"): v for key, v in changes.items()}
    return memory_need(parse_run_config(typed), load_config(str(tiny_llama)), "cpu")


@pytest.mark.parametrize("bits", [0, 8, 4])
def test_the_base_takes_the_predicted_memory(tiny_llama, tmp_path, bits):
    model = load_base(str(tiny_llama), bits, tmp_path, "cpu")

    need = needed(tiny_llama, model__quantization=bits).base
    assert need == pytest.approx(total_bytes(model), rel=0.05)


def test_quantised_embeddings_take_the_predicted_memory(tiny_llama, tmp_path):
    model = load_base(str(tiny_llama), 4, tmp_path, "cpu", quantize_embeddings=True)

    need = needed(tiny_llama, model__quantize_embeddings=True).base
    # The scales of embeddings and head are kept apart from the modules' tensors.
    states = [model.get_input_embeddings().weight.quant_state]
    states += [rows.state for rows in model.get_output_embeddings().parts]
    scales = sum(state.absmax.nbytes for state in states)
    assert need == pytest.approx(total_bytes(model) + scales, rel=0.05)


def test_an_adapter_with_adam_takes_twice_that_with_sgd(tiny_llama):
    sgd = needed(tiny_llama, adapter__rank=4)
    adam = needed(tiny_llama, adapter__rank=4, train__optimizer="adamw")

    # B of q_proj (64 x 4) and v_proj (32 x 4), in 2 layers: value and gradient.
    assert sgd.adapter == 2 * (64 + 32) * 4 * 4 * 2
    assert adam.adapter == 2 * sgd.adapter


def test_checkpointing_and_smaller_batches_need_less(tiny_llama):
    plain = needed(tiny_llama)
    half = needed(tiny_llama, train__batch_size=4)
    light = needed(tiny_llama, train__gradient_checkpointing=True)

    assert half.activations == plain.activations / 2
    assert light.activations < plain.activations
    small = needed(tiny_llama, train__activation_compression=True)
    assert small.activations < plain.activations


def test_the_two_answers_of_a_preference_take_twice_the_activations(tiny_llama):
    answers, pairs = needed(tiny_llama), needed(tiny_llama, train__objective="dpo")

    assert pairs.activations == 2 * answers.activations
