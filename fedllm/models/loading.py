"""The base model: quantise it once, keep it in a cache, load it and its tokenizer."""

import hashlib
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedllm.atomic_files import create_once, is_disk_full
from fedllm.errors import ModelError
from fedllm.models.load_errors import loading_errors, no_progress_bars
from fedllm.models.location import commit_of, load_config, load_options
from fedllm.models.manifest import (
    QUANTISED_FOLDER,
    file_hashes,
    forget,
)
from fedllm.models.quantization import (
    is_no_cast,
    keep_gradients_right,
    layers_kept_wide,
    require_bitsandbytes,
)

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


def load_tokenizer(location: str) -> "PreTrainedTokenizerBase":
    """Return the model's tokenizer, with a padding token and padding on the right.

    If it has no padding token, the end of text serves: the attention mask marks padding,
    never its id.

    Raises:
        ModelError: It cannot be read or reached, or names no end of text.
    """
    from transformers import AutoTokenizer

    source = load_options(location)
    with loading_errors(location):
        tokenizer: Any = AutoTokenizer.from_pretrained(**source, padding_side="right")
    if tokenizer.eos_token_id is None:
        raise ModelError(
            f"the tokenizer of {location} names no end of text (eos_token), without"
            " which an answer cannot learn to stop"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    result: PreTrainedTokenizerBase = tokenizer
    return result


def compute_dtype(device: str) -> "torch.dtype":
    """Return the type to compute in: the fastest of the hardware that trains well.

    bfloat16 if the hardware multiplies it; else float16 on a GPU, and float32 on a CPU, on
    which an emulated bfloat16 would be slower.
    """
    import torch

    if device.startswith("cuda"):
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if native else torch.float16
    cpu = torch.cpu.get_capabilities()
    native = cpu.get("avx512_bf16") or cpu.get("amx_bf16")
    return torch.bfloat16 if native else torch.float32


def load_base(
    location: str,
    quantization: int,
    home: Path,
    device: str | None = None,
    quantize_embeddings: bool = False,
    in_float32: bool = False,
) -> "PreTrainedModel":
    """Return the frozen base model, in eval mode, with its key-value cache off.

    A quantised base is kept under `home`, so that only the first load quantises.
    Gradients through it are right in train and in eval mode.

    Args:
        location: What `locate` returned.
        quantization: 4 (NF4, double quantisation), 8 (LLM.int8) or 0.
        home: The program's folder.
        device: "cuda", "cuda:1", "cpu"; by default a GPU if there is one.
        quantize_embeddings: Keep the input embeddings in NF4 and the output head in
            8 bit, whatever `quantization` is.
        in_float32: Load and compute an unquantised base in float32, in which every saved
            type is exact, instead of in `compute_dtype`.

    Raises:
        ModelError: It cannot be read, reached, quantised or held in memory, or its
            embeddings are to be quantised and are its output head, too.
    """
    import torch

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    load_config(location)
    if Path(location).is_dir():
        file_hashes(Path(location), home)
    if quantization:
        require_bitsandbytes(device)
        model = _load_quantised(location, quantization, home, device)
        if quantization == 4:
            keep_gradients_right(model)
        # An 8-bit layer logs at each pass that it casts to float16, as is its design.
        logging.getLogger("bitsandbytes.autograd._functions").addFilter(is_no_cast)
    else:
        options = {"dtype": torch.float32} if in_float32 else {}
        model = _load(location, device, **options)
    if quantize_embeddings:
        require_bitsandbytes(device)
        from fedllm.models.quantized_embeddings import quantise_embeddings

        quantise_embeddings(model)
    if device == "cpu":
        from fedllm.models.attention import use_fast_gradients

        use_fast_gradients(model)
    # PEFT writes this name into the adapter: a reader needs the model, not our cache.
    model.name_or_path = model.config._name_or_path = location
    model.config.use_cache = False
    model.requires_grad_(False)
    return model.eval()


def load_quantised(
    location: str, bits: int, device: str | None = None
) -> "PreTrainedModel":
    """Return a model quantised anew, to be saved elsewhere; the cache is not used.

    Args:
        location: Folder of an unquantised model.
        bits: 4 or 8, as in `load_base`.
        device: As in `load_base`.

    Raises:
        ModelError: It cannot be read or quantised here.
    """
    import torch

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    require_bitsandbytes(device)
    options = _quantization_config(location, bits, device)
    model: PreTrainedModel = _load(location, device, quantization_config=options)
    return model


def _load(location: str, device: str, **options: Any) -> Any:
    """Load a causal language model onto a device."""
    from transformers import AutoModelForCausalLM

    # A download from the hub is gigabytes: its progress bar stays.
    with (
        no_progress_bars() if Path(location).is_dir() else nullcontext(),
        loading_errors(location),
    ):
        return AutoModelForCausalLM.from_pretrained(
            device_map={"": device},
            # Other formats of weights are pickles, which may hold code.
            use_safetensors=True,
            **{**load_options(location), "dtype": compute_dtype(device), **options},
        )


def _load_quantised(location: str, bits: int, home: Path, device: str) -> Any:
    """Load a quantised base from the cache, quantising it if it is not there."""
    made: list[Any] = []

    def quantise() -> Any:
        from fedllm.models.quantized_embeddings import quantised_in_parts

        logger.info("quantising %s to %d bit (once)", location, bits)
        with _read_not_mapped(), quantised_in_parts():
            return _load(
                location,
                device,
                quantization_config=_quantization_config(location, bits, device),
            )

    def make(folder: Path) -> None:
        made.append(quantise())
        with no_progress_bars():
            made[0].save_pretrained(folder)

    folder = home / QUANTISED_FOLDER / _key(location, bits, device)
    try:
        create_once(folder, make)
    except ModelError:
        raise
    except Exception as error:
        # safetensors has an error of its own for a failed write.
        if not isinstance(error, OSError) and not is_disk_full(error):
            raise
        logger.warning(
            "the quantised model cannot be kept in %s (%s): it is quantised again at"
            " each start",
            folder.parent,
            "no space left" if is_disk_full(error) else error,
        )
        return made[0] if made else quantise()
    if made:
        forget(folder, home)
    file_hashes(folder, home)
    return made[0] if made else _load(str(folder), device)


@contextmanager
def _read_not_mapped() -> Iterator[None]:
    """Make transformers read one weight at a time instead of mapping the files.

    It closes the files when the last weight is quantised. Until then every page read of a
    mapping counts as the process's memory, which would grow to the unquantised model's size.
    """
    from transformers import modeling_utils

    mapped = modeling_utils.safe_open

    def read(*args: Any, **options: Any) -> Any:
        return mapped(*args, **{**options, "backend": "pread"})

    modeling_utils.safe_open = read
    try:
        yield
    finally:
        modeling_utils.safe_open = mapped


def _quantization_config(location: str, bits: int, device: str) -> Any:
    """Return transformers' settings of bitsandbytes."""
    from transformers import BitsAndBytesConfig

    kept = layers_kept_wide(load_config(location), bits)
    if bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=kept)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        # The name is of both kinds.
        llm_int8_skip_modules=kept,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype(device),
    )


def _key(location: str, bits: int, device: str) -> str:
    """Return a folder name that changes with all that the quantised weights depend on.

    A local model counts as changed if a file's size or time changed: reading gigabytes at
    every start would cost what the cache saves.
    """
    import bitsandbytes

    folder = Path(location)
    content: Any = commit_of(location)
    if folder.is_dir():
        files = sorted(path for path in folder.iterdir() if path.is_file())
        stats = ((path.name, path.stat()) for path in files)
        content = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]
    parts = [
        *(location, content, bits, str(compute_dtype(device))),
        bitsandbytes.__version__,
    ]
    digest = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
    return f"{folder.name}-{bits}bit-{digest[:16]}"
