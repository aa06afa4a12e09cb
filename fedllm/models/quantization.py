"""bitsandbytes: its import, its checks and its workarounds."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

from fedllm.errors import ModelError
from fedllm.models.layer_shapes import is_read_past
from fedllm.models.load_errors import errors_only

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

_BITSANDBYTES_REMEDY = (
    "reinstall it (`pip install bitsandbytes`) or set model.quantization=0"
)


def import_bitsandbytes() -> None:
    """Import bitsandbytes, without torch's compiler if nothing that it compiles is run.

    It hands torch.compile the operators of devices that it has no kernels for, which
    imports the compiler: 0.6 s. A CPU and CUDA have kernels.

    Raises:
        ModelError: It is broken here.
    """
    import torch

    accelerator = torch.accelerator.current_accelerator()
    has_kernels = accelerator is None or accelerator.type == "cuda"
    with errors_only("bitsandbytes.backends.cpu.ops"):
        # On import it logs that a faster kernel is missing, for a packing that we switch off.
        try:
            with _uncompiled() if has_kernels else nullcontext():
                import bitsandbytes  # noqa: F401 - it is imported to fail here
        except Exception as error:
            # A broken native library fails at import with whatever its loader raises.
            raise ModelError(
                f"bitsandbytes cannot be used ({error}): {_BITSANDBYTES_REMEDY}"
            ) from error


@contextmanager
def _uncompiled() -> Iterator[None]:
    """Make torch.compile return functions as they are."""
    import torch

    def unchanged(function: Any = None, **_: Any) -> Any:
        return unchanged if function is None else function

    compiler = torch.compile
    torch.compile = unchanged  # type: ignore[assignment] # a stand-in
    try:
        yield
    finally:
        torch.compile = compiler


def require_bitsandbytes(device: str) -> None:
    """Raise if bitsandbytes has no backend or library for a device.

    Raises:
        ModelError: It has none.
    """
    import_bitsandbytes()
    from bitsandbytes import cextension, supported_torch_devices

    kind = device.partition(":")[0]
    if kind not in supported_torch_devices:
        raise ModelError(
            f"bitsandbytes has no backend for {kind}: {_BITSANDBYTES_REMEDY}"
        )
    missing = isinstance(cextension.lib, cextension.ErrorHandlerMockBNBNativeLibrary)
    if missing:
        raise ModelError(
            f"bitsandbytes has no library for this machine: {_BITSANDBYTES_REMEDY}"
        )


def keep_gradients_right(model: "PreTrainedModel") -> None:
    """Switch off bitsandbytes' packing of 4-bit weights on a CPU with AVX512-BF16.

    In eval mode it rewrites the weights for a product that has no backward pass, and they
    stay so: training after a generation would then silently get wrong gradients.
    """
    from bitsandbytes.nn import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


def layers_kept_wide(config: "PretrainedConfig", bits: int) -> list[str] | None:
    """Return the linear layers that bitsandbytes must leave as they are; None: its choice.

    Those whose weight the model reads itself, and in 8 bit those of DeepSeek's attention
    that get four dimensions, which bitsandbytes' kernel for a CPU computes wrongly.
    """
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    kept, heads = [], []
    for name, module in model.named_modules():
        parent, _, last = name.rpartition(".")
        if is_read_past(model.get_submodule(parent), last) or (
            bits == 8 and last == "kv_b_proj"
        ):
            kept.append(name)
        elif module is model.get_output_embeddings():
            heads.append(name)
    # A list of ours takes the place of bitsandbytes' own, which is the head.
    return [*kept, *heads] if kept else None


def is_no_cast(record: logging.LogRecord) -> bool:
    """Return whether a log record is not the notice of a cast of the inputs."""
    return "inputs will be cast" not in str(record.msg)


def try_quantization(bits: int, device: str) -> None:
    """Quantise a small matrix and back, to prove that this machine can.

    Args:
        bits: 4 or 8.
        device: "cuda" or "cpu".

    Raises:
        ModelError: It cannot, or the values that come back are wrong.
    """
    import torch

    require_bitsandbytes(device)
    from bitsandbytes import functional

    matrix = torch.linspace(-1, 1, 4096, device=device).reshape(64, 64)
    try:
        if bits == 4:
            packed, state = functional.quantize_4bit(matrix, quant_type="nf4")
            back = functional.dequantize_4bit(packed, state)
        else:
            packed, scale, _ = functional.int8_vectorwise_quant(matrix.half())
            back = packed.float() * scale.reshape(-1, 1) / 127
    except Exception as error:
        raise ModelError(
            f"bitsandbytes fails on {device} ({error}): reinstall it (`pip install"
            " bitsandbytes`) or set model.quantization=0"
        ) from error
    if float((back - matrix).norm() / matrix.norm()) > 0.2:
        raise ModelError(
            f"bitsandbytes gives wrong values on {device}: set model.quantization=0"
        )
