import logging
import os
import shutil
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from fedllm.errors import ModelError
from fedllm.models import builtin, loading, quantized_embeddings
from fedllm.models.loading import load_base, load_config, load_tokenizer, locate

IDS = torch.arange(3, 35).reshape(2, 16)


@pytest.fixture(autouse=True)
def _no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


@pytest.fixture
def own_llama(tiny_llama: Path, tmp_path: Path) -> Path:
    """A copy of the small model that a test may spoil."""
    return Path(shutil.copytree(tiny_llama, tmp_path / "llama"))


def _logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=IDS).logits
    return logits


def _gradient(model: Any) -> torch.Tensor:
    """Of the loss, through every layer, with respect to the embedded tokens."""
    embedded = model.get_input_embeddings()(IDS).detach().requires_grad_()
    model(inputs_embeds=embedded, labels=IDS).loss.backward()
    assert embedded.grad is not None
    return embedded.grad.float()


def _adapter_gradient(model: Any) -> torch.Tensor:
    """Of the loss, through LoRA on every linear layer, with respect to its factors."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    adapted = get_peft_model(model, config).eval()
    adapted(input_ids=IDS, labels=IDS).loss.backward()
    values = [p.grad.flatten() for p in adapted.parameters() if p.requires_grad]
    return torch.cat(values).float()


def _dequantised(quantised: Any, plain: Any) -> Any:
    """`plain` with the weights that the 4-bit layers stand for."""
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit

    for name, module in quantised.named_modules():
        if isinstance(module, Linear4bit):
            weight = dequantize_4bit(module.weight.data, module.weight.quant_state)
            plain.get_submodule(name).weight.data.copy_(weight)
    return plain


def _relative_error(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((got - wanted).norm() / wanted.norm())


def test_a_local_folder_is_found_by_its_absolute_path(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tiny_llama.parent)

    assert locate(tiny_llama.name, tmp_path) == str(tiny_llama.resolve())
    assert locate(f"./{tiny_llama.name}", tmp_path) == str(tiny_llama.resolve())


def test_the_built_in_model_is_found_in_the_home_folder(tmp_path: Path) -> None:
    (tmp_path / "models" / loading.BUILT_IN).mkdir(parents=True)

    assert locate(loading.BUILT_IN, tmp_path) == str(
        tmp_path / "models/smollm2-135m-instruct"
    )


def test_a_hub_id_stays_as_it_is(tmp_path: Path) -> None:
    assert locate("openlm-research/open_llama_3b_v2", tmp_path) == (
        "openlm-research/open_llama_3b_v2"
    )


@pytest.mark.parametrize(
    "name", ["/no/such", "./no", "~/no-such", "a/b/c", "a b", "a:b"]
)
def test_a_path_that_does_not_exist_is_no_hub_id(name: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="is not a folder on this machine"):
        locate(name, tmp_path)


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="has no config"):
        locate(str(tmp_path), tmp_path)


def test_a_hub_out_of_reach_is_said_in_one_line_with_what_to_do() -> None:
    for load in (load_config, load_tokenizer):
        with pytest.raises(
            ModelError, match=r"hub is out of reach.*local folder"
        ) as raised:
            load("someone/no-such-model-here")
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("config.json", "{"),
        ("config.json", '{"model_type": "no-such-type"}'),
        ("config.json", '{"model_type": "vit"}'),
        ("config.json", '{"auto_map": {"AutoConfig": "own.C"}, "model_type": "own"}'),
        (
            "config.json",
            '{"model_type": "llama", "quantization_config": {"quant_method": "gptq"}}',
        ),
    ],
)
def test_a_configuration_that_cannot_be_used_is_one_line(
    own_llama: Path, file: str, text: str
) -> None:
    (own_llama / file).write_text(text)

    with pytest.raises(ModelError) as raised:
        load_config(str(own_llama))

    assert str(own_llama) in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("quantization", [0, 4])
def test_damaged_weights_are_one_line(
    own_llama: Path, tmp_path: Path, quantization: int
) -> None:
    weights = own_llama / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])

    with pytest.raises(ModelError, match="cannot be loaded") as raised:
        load_base(str(own_llama), quantization, tmp_path, "cpu")

    assert "\n" not in str(raised.value)


def test_the_tokenizer_pads_with_the_end_of_text_where_it_has_no_padding(
    tiny_llama: Path,
) -> None:
    tokenizer: Any = load_tokenizer(str(tiny_llama))

    assert tokenizer.chat_template is None
    assert tokenizer.pad_token == tokenizer.eos_token == "</s>"
    assert tokenizer.padding_side == "right"
    text = "What is a vaccine? Ünknown letters too."
    assert tokenizer.decode(tokenizer(text)["input_ids"][1:]) == text


def test_a_chat_template_survives_saving(tiny_chat_llama: Path, tmp_path: Path) -> None:
    load_tokenizer(str(tiny_chat_llama)).save_pretrained(tmp_path)

    prompt = load_tokenizer(str(tmp_path)).apply_chat_template(
        [{"role": "user", "content": "Hello"}],
        tokenize=False,
        add_generation_prompt=True,
    )

    assert prompt == "<|user|>\nHello</s>\n<|assistant|>\n"


def test_a_tokenizer_without_an_end_of_text_is_refused(own_llama: Path) -> None:
    file = own_llama / "tokenizer_config.json"
    file.write_text(file.read_text().replace('"</s>"', "null"))

    with pytest.raises(ModelError, match="eos_token"):
        load_tokenizer(str(own_llama))


@pytest.mark.parametrize("quantization", [0, 4, 8])
def test_the_base_is_frozen_and_carries_the_name_of_the_model(
    tiny_llama: Path, tmp_path: Path, quantization: int
) -> None:
    for _ in range(2):
        model: Any = load_base(str(tiny_llama), quantization, tmp_path, "cpu")

        assert not any(p.requires_grad for p in model.parameters())
        assert not model.training
        assert model.config.use_cache is False
        assert model.name_or_path == model.config._name_or_path == str(tiny_llama)
        assert model.dtype == loading.compute_dtype("cpu")


@pytest.mark.parametrize("quantization", [4, 8])
def test_a_second_load_takes_the_quantised_weights_from_disk(
    tiny_llama: Path,
    tmp_path: Path,
    quantization: int,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "fedllm.models.loading")
    first = load_base(str(tiny_llama), quantization, tmp_path, "cpu")
    said = len(caplog.records)

    second = load_base(str(tiny_llama), quantization, tmp_path, "cpu")

    assert said == len(caplog.records) == 1
    assert torch.equal(_logits(first), _logits(second))
    plain = load_base(str(tiny_llama), 0, tmp_path, "cpu")
    assert not torch.equal(_logits(first), _logits(plain))


def test_a_changed_model_is_quantised_anew(own_llama: Path, tmp_path: Path) -> None:
    before = _logits(load_base(str(own_llama), 4, tmp_path, "cpu"))
    changed = AutoModelForCausalLM.from_pretrained(own_llama)
    changed.model.layers[0].mlp.up_proj.weight.data.mul_(3)
    changed.save_pretrained(own_llama)

    assert not torch.equal(
        before, _logits(load_base(str(own_llama), 4, tmp_path, "cpu"))
    )


def test_a_full_disk_costs_the_cache_and_not_the_run(
    tiny_llama: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    from transformers import PreTrainedModel

    def save_pretrained(*_: object, **__: object) -> None:
        raise OSError(28, os.strerror(28))

    expected = _logits(load_base(str(tiny_llama), 4, tmp_path / "roomy", "cpu"))
    monkeypatch.setattr(PreTrainedModel, "save_pretrained", save_pretrained)

    model = load_base(str(tiny_llama), 4, tmp_path, "cpu")

    assert torch.equal(_logits(model), expected)
    assert "no space left" in caplog.text
    cache = tmp_path / "models/quantised"
    assert [path for path in cache.iterdir() if path.is_dir()] == []


def test_a_home_that_cannot_be_written_to_costs_the_cache_and_not_the_run(
    tiny_llama: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "home").write_text("a file where the folder should be")

    load_base(str(tiny_llama), 4, tmp_path / "home", "cpu")

    assert "cannot be kept" in caplog.text


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
@pytest.mark.parametrize("generated_before", [False, True])
@pytest.mark.parametrize(
    ("gradient", "dtype"),
    [
        (_gradient, torch.bfloat16),
        (_gradient, torch.float32),
        # PEFT rounds at other places on the two bases, which bfloat16 would show.
        (_adapter_gradient, torch.float32),
    ],
)
def test_gradients_through_four_bits_are_those_through_the_dequantised_copy(
    tiny_llama: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    generated_before: bool,
    gradient: Any,
    dtype: torch.dtype,
) -> None:
    monkeypatch.setattr(loading, "compute_dtype", lambda device: dtype)
    quantised: Any = load_base(str(tiny_llama), 4, tmp_path, "cpu")
    plain = load_base(str(tiny_llama), 0, tmp_path, "cpu")
    reference = gradient(_dequantised(quantised, plain))

    if generated_before:
        quantised.generate(IDS, max_new_tokens=3, use_cache=True, pad_token_id=2)

    assert _relative_error(gradient(quantised), reference) < 1e-3


def test_no_four_bit_layer_may_repack_its_weights(
    tiny_llama: Path, tmp_path: Path
) -> None:
    """The test above sees the fault only on a CPU that has AVX512-BF16."""
    from bitsandbytes.nn import Linear4bit

    for _ in range(2):
        model = load_base(str(tiny_llama), 4, tmp_path, "cpu")
        layers = [m for m in model.modules() if isinstance(m, Linear4bit)]

        assert len(layers) == 14
        assert not any(layer.support_avx512bf16_for_cpu for layer in layers)
    assert hasattr(Linear4bit(64, 64), "support_avx512bf16_for_cpu"), "it was renamed"


def test_gradients_through_eight_bits_are_close_also_after_a_generation(
    tiny_llama: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(loading, "compute_dtype", lambda device: torch.bfloat16)
    quantised: Any = load_base(str(tiny_llama), 8, tmp_path, "cpu")
    reference = _gradient(load_base(str(tiny_llama), 0, tmp_path, "cpu"))
    before = _gradient(quantised)

    quantised.generate(IDS, max_new_tokens=3, use_cache=True, pad_token_id=2)

    assert torch.equal(_gradient(quantised), before)
    assert _relative_error(before, reference) < 0.1
    assert "MatMul8bitLt" not in caplog.text, "noise in each layer at each pass"


def test_four_bits_are_nf4_with_double_quantisation(
    tiny_llama: Path, tmp_path: Path
) -> None:
    model: Any = load_base(str(tiny_llama), 4, tmp_path, "cpu")

    state = model.model.layers[0].mlp.up_proj.weight.quant_state
    assert (state.quant_type, state.nested) == ("nf4", True)
    config = model.config.quantization_config
    assert isinstance(config, BitsAndBytesConfig)
    assert config.bnb_4bit_compute_dtype == loading.compute_dtype("cpu")


def test_a_machine_without_a_backend_is_said_before_anything_loads(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import bitsandbytes

    monkeypatch.setattr(bitsandbytes, "supported_torch_devices", {"cuda"})
    monkeypatch.setattr(loading, "_load", None)

    with pytest.raises(ModelError, match=r"no backend for cpu.*model.quantization=0"):
        load_base(str(tiny_llama), 4, tmp_path, "cpu")


def test_a_machine_without_the_native_library_is_told_before_anything_loads(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bitsandbytes import cextension

    absent = cextension.ErrorHandlerMockBNBNativeLibrary("absent")
    monkeypatch.setattr(cextension, "lib", absent)
    monkeypatch.setattr(loading, "_load", None)

    with pytest.raises(ModelError, match=r"no library.*model\.quantization=0"):
        load_base(str(tiny_llama), 8, tmp_path, "cpu")


def test_a_machine_without_bitsandbytes_is_told_what_to_do(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)

    with pytest.raises(ModelError, match=r"model\.quantization=0"):
        load_base(str(tiny_llama), 4, tmp_path, "cpu")


def test_a_model_too_large_for_the_memory_is_one_line(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def from_pretrained(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", from_pretrained)

    with pytest.raises(ModelError, match="does not fit into memory"):
        load_base(str(tiny_llama), 0, tmp_path, "cpu")


def test_cpus_compute_in_bfloat16_only_where_they_multiply_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for features, dtype in [
        ({"avx512_bf16": True}, torch.bfloat16),
        ({"amx_bf16": True}, torch.bfloat16),
        ({"avx2": True, "avx512_bf16": False}, torch.float32),
        ({}, torch.float32),
    ]:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda f=features: f)
        assert loading.compute_dtype("cpu") == dtype


def test_what_is_loaded_from_bfloat16_files_gives_the_logits_that_were_saved(
    tiny_llama: Path, tmp_path: Path
) -> None:
    saved = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.bfloat16)
    saved.save_pretrained(tmp_path / "saved")

    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "saved", dtype=torch.bfloat16
    )

    assert torch.equal(_logits(saved), _logits(loaded))


def test_the_built_in_name_is_the_one_that_is_fetched() -> None:
    assert loading.BUILT_IN == builtin.NAME == "smollm2-135m-instruct"


@pytest.mark.parametrize("quantization", [0, 4])
def test_embeddings_in_nf4_look_up_what_nf4_keeps(
    tiny_llama: Path, tmp_path: Path, quantization: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    plain = load_base(str(tiny_llama), quantization, tmp_path, "cpu")
    table = plain.get_input_embeddings().weight
    expected = dequantize_4bit(*quantize_4bit(table, quant_type="nf4"))
    # Parts that do not divide the vocabulary.
    monkeypatch.setattr(quantized_embeddings, "_ROWS_PER_PART", 100)

    small = load_base(
        str(tiny_llama), quantization, tmp_path, "cpu", quantize_embeddings=True
    )

    assert torch.equal(small.get_input_embeddings()(IDS), expected[IDS])
    assert not torch.equal(_logits(small), _logits(plain))


def _in_8_bit(matrix: torch.Tensor) -> torch.Tensor:
    """Return what 8 bit with a scale for 256 values keep of a matrix."""
    from bitsandbytes.functional import dequantize_blockwise, quantize_blockwise

    return dequantize_blockwise(*quantize_blockwise(matrix, blocksize=256))


@pytest.mark.parametrize("quantization", [0, 4])
def test_a_quantised_output_head_scores_and_gives_gradients_as_8_bit_keep_it(
    tiny_llama: Path, tmp_path: Path, quantization: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Parts that do not divide the vocabulary.
    monkeypatch.setattr(quantized_embeddings, "_TOKENS_PER_PART", 100)
    plain = load_base(str(tiny_llama), quantization, tmp_path, "cpu")
    matrix = plain.get_output_embeddings().weight
    expected = torch.cat([_in_8_bit(rows) for rows in torch.split(matrix, 100)])

    head = load_base(
        str(tiny_llama), quantization, tmp_path, "cpu", quantize_embeddings=True
    ).get_output_embeddings()
    states = torch.randn(3, matrix.shape[1]).to(matrix.dtype).requires_grad_()
    scores = head(states)
    up = torch.randn(scores.shape).to(scores.dtype)
    (gradient,) = torch.autograd.grad(scores, states, up)

    assert torch.equal(torch.cat([rows.whole() for rows in head.parts]), expected)
    tolerance = {"rtol": 0.02, "atol": 0.02}  # of bfloat16, where a CPU has it
    torch.testing.assert_close(scores, states @ expected.T, **tolerance)
    torch.testing.assert_close(gradient, up @ expected, **tolerance)
    assert not torch.equal(expected, matrix)
    assert {tensor.dtype for tensor in head.buffers()} == {torch.uint8}


def test_a_quantised_output_head_expands_one_part_at_a_time_and_keeps_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(quantized_embeddings, "_TOKENS_PER_PART", 10)
    head = quantized_embeddings.HeadInParts(torch.nn.Linear(64, 100, bias=False))
    alive: list[weakref.ref[torch.Tensor]] = []
    most = 0
    expand = quantized_embeddings._Rows.whole

    def whole(rows: Any) -> torch.Tensor:
        nonlocal most
        made = expand(rows)
        alive.append(weakref.ref(made))
        most = max(most, sum(ref() is not None for ref in alive))
        return made

    monkeypatch.setattr(quantized_embeddings._Rows, "whole", whole)
    head(torch.randn(2, 64, requires_grad=True)).sum().backward()

    assert len(alive) == 20
    assert most == 1


def test_a_quantised_output_head_keeps_its_bias() -> None:
    head = torch.nn.Linear(64, 250)

    narrow = quantized_embeddings.HeadInParts(head)

    assert torch.equal(narrow(torch.zeros(2, 64)), head.bias.expand(2, -1))


def test_embeddings_that_are_the_output_head_stay(
    own_llama: Path, tmp_path: Path
) -> None:
    tied = AutoModelForCausalLM.from_pretrained(own_llama)
    tied.config.tie_word_embeddings = True
    tied.tie_weights()
    tied.save_pretrained(own_llama)

    with pytest.raises(ModelError, match="quantize-embeddings=false"):
        load_base(str(own_llama), 4, tmp_path, "cpu", quantize_embeddings=True)


def test_weights_quantised_in_parts_are_those_quantised_whole(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = load_base(str(tiny_llama), 4, tmp_path / "whole", "cpu").state_dict()
    monkeypatch.setattr(quantized_embeddings, "_ROWS_PER_PART", 16)

    parts = load_base(str(tiny_llama), 4, tmp_path / "parts", "cpu").state_dict()

    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
