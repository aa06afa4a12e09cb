"""Quantised layers: exact gradients, and machines without a backend."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BitsAndBytesConfig

from fedllm.errors import ModelError
from fedllm.models import loading
from fedllm.models.loading import load_base
from fedllm.models.quantization import layers_kept_wide
from tests.helpers.architectures import ARCHITECTURES
from tests.helpers.passes import IDS, _gradient, _relative_error


def test_quantisation_that_gives_wrong_values_raises_an_error(monkeypatch):
    from bitsandbytes import functional

    from fedllm.models.quantization import try_quantization

    try_quantization(4, "cpu")
    try_quantization(8, "cpu")
    monkeypatch.setattr(functional, "dequantize_4bit", lambda q, s: q.float().mean())
    with pytest.raises(ModelError, match="wrong values"):
        try_quantization(4, "cpu")


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


def test_a_machine_without_a_backend_raises_an_error_before_anything_loads(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import bitsandbytes

    monkeypatch.setattr(bitsandbytes, "supported_torch_devices", {"cuda"})
    monkeypatch.setattr(loading, "_load", None)

    with pytest.raises(ModelError, match=r"no backend for cpu.*model.quantization=0"):
        load_base(str(tiny_llama), 4, tmp_path, "cpu")


def test_a_machine_without_the_native_library_raises_an_error_before_anything_loads(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bitsandbytes import cextension

    absent = cextension.ErrorHandlerMockBNBNativeLibrary("absent")
    monkeypatch.setattr(cextension, "lib", absent)
    monkeypatch.setattr(loading, "_load", None)

    with pytest.raises(ModelError, match=r"no library.*model\.quantization=0"):
        load_base(str(tiny_llama), 8, tmp_path, "cpu")


def test_a_machine_without_bitsandbytes_raises_an_error_with_a_remedy(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)

    with pytest.raises(ModelError, match=r"model\.quantization=0"):
        load_base(str(tiny_llama), 4, tmp_path, "cpu")


FETCHES = """
import os, pathlib
pathlib.Path(os.environ["MARKER"]).touch()
def get_kernel(*_, **__):
    pathlib.Path(os.environ["MARKER"]).touch()
"""


def test_no_native_code_comes_from_a_hub_even_if_kernels_is_installed(tmp_path):
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text(FETCHES)
    code = "\n".join(
        [
            "import fedllm",
            "from importlib.util import find_spec",
            # What bitsandbytes does on a CPU with bfloat16, and transformers on any.
            "try:",
            "    from kernels import get_kernel",
            "except ImportError:",
            "    print('fetched nothing', find_spec('kernels'))",
        ]
    )
    paths = os.pathsep.join([str(tmp_path), str(Path(__file__).parents[2])])
    env = os.environ | {"PYTHONPATH": paths, "MARKER": str(tmp_path / "marker")}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=env,
        capture_output=True,
        text=True,
        check=True,
    )

    assert done.stdout == "fetched nothing None\n", done.stderr
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize(
    ("name", "bits", "kept"),
    [
        ("Llama", 4, None),
        ("Mamba", 4, {"x_proj", "dt_proj", "out_proj", "lm_head"}),
        ("Falcon-H1", 8, {"out_proj", "lm_head"}),
        ("DeepSeek V3", 8, {"kv_b_proj", "lm_head"}),
        ("DeepSeek V3", 4, None),
    ],
)
def test_layers_whose_weights_the_model_reads_itself_are_not_quantised(
    name, bits, kept
):
    config = next(a for a in ARCHITECTURES if a.name == name).config()

    names = layers_kept_wide(config, bits)

    assert kept == (names and {name.rpartition(".")[2] for name in names})
