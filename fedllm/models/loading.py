"""The base model: find it, quantise it once, keep it in a cache, load it."""

import hashlib
import json
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedllm.atomic_files import create_once, is_disk_full
from fedllm.errors import ModelError
from fedllm.models import builtin
from fedllm.models.known import BUILT_IN_MODEL
from fedllm.models.load_errors import loading_errors, no_progress_bars
from fedllm.models.manifest import (
    QUANTISED_FOLDER,
    file_hashes,
    folder_digest,
    forget,
)
from fedllm.models.quantization import (
    is_no_cast,
    keep_gradients_right,
    require_bitsandbytes,
)

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

_ADAPTER_FILE = "adapter_config.json"
_CONFIG = "config.json"
_HUB_ID = re.compile(r"(?P<name>[\w.-]+(/[\w.-]+)?)(@(?P<commit>[0-9a-f]{40}))?")


def locate(name: str, home: Path) -> str:
    """Return the place of the base model, fetching the built-in one on first use.

    Args:
        name: The built-in model's name, a local folder, or a hub id.
        home: The program's folder.

    Returns:
        An absolute folder, or the hub id.

    Raises:
        ModelError: The folder does not exist or holds no model, the name is no hub id
            either, or the built-in model cannot be fetched.
    """
    if name == BUILT_IN_MODEL.name:
        return str(builtin.fetch(home).resolve())
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ModelError(
                f"{folder.resolve()} holds no model: it has no config.json;"
                " model.name takes a folder that transformers' save_pretrained made"
            )
        if (folder / _ADAPTER_FILE).exists():
            raise ModelError(_adapter_in_base(str(folder.resolve())))
        return str(folder.resolve())
    if name.startswith(("/", ".", "~")) or not _HUB_ID.fullmatch(name):
        raise ModelError(
            f"{name} is not a folder on this machine; model.name takes "
            f"{BUILT_IN_MODEL.name}, a folder, or a hub id such as "
            f"{BUILT_IN_MODEL.hub_name}, alone or pinned by @ and a commit of 40 "
            "hexadecimal digits"
        )
    return name


def repository(location: str) -> tuple[str, str | None]:
    """Return the hub's name of a location, and the commit that it is pinned to, if any.

    Args:
        location: What `locate` returned.
    """
    found = None if Path(location).is_dir() else _HUB_ID.fullmatch(location)
    return (location, None) if found is None else (found["name"], found["commit"])


@lru_cache(maxsize=8)
def _commit(location: str) -> str | None:
    """Return the commit of a hub id that all of this process takes; None for a folder.

    Without a pin it is the hub's newest when the process first asks: configuration, weights
    and tokenizer are of one commit, whatever is pushed meanwhile.

    Raises:
        ModelError: The hub is out of reach and the model is not in its cache.
    """
    if Path(location).is_dir():
        return None
    from transformers.utils import cached_file

    name, commit = repository(location)
    if commit is not None:
        return commit
    with loading_errors(location):
        found = re.search(
            r"/snapshots/([0-9a-f]{40})/", str(cached_file(name, _CONFIG))
        )
        if found is None:
            raise OSError(f"its {_CONFIG} is of no commit")
        return found[1]


def _source(location: str) -> dict[str, Any]:
    """Return the arguments by which transformers finds a model and runs no code of it."""
    source = {"trust_remote_code": False, "revision": _commit(location)}
    name, _ = repository(location)
    return {
        "pretrained_model_name_or_path": name,
        **{key: value for key, value in source.items() if value is not None},
    }


def _adapter_in_base(location: str) -> str:
    """Return why a base with an adapter beside it is refused.

    transformers would put that adapter into what is taken for the frozen base, or take the
    weights from the repository that the adapter names.
    """
    return (
        f"{location} holds an adapter ({_ADAPTER_FILE}) and not a base model alone: name"
        " the model that it was made for, or one that `fedllm export` has merged"
    )


def load_config(location: str) -> "PretrainedConfig":
    """Return the model's configuration, without its weights.

    Raises:
        ModelError: It cannot be read or reached, is no causal language model, needs
            code of its own, or is quantised already.
    """
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    )

    if not Path(location).is_dir() and _hub_has_adapter(location):
        raise ModelError(_adapter_in_base(location))
    with loading_errors(location):
        config = AutoConfig.from_pretrained(**_source(location))
    if config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise ModelError(
            f"{location} is a {config.model_type} model, which does not generate text;"
            " model.name takes a causal language model"
        )
    if getattr(config, "quantization_config", None) is not None:
        raise ModelError(
            f"{location} is quantised already: name the model that it was made from,"
            " and set model.quantization (0, 4 or 8)"
        )
    return config


def _hub_has_adapter(location: str) -> bool:
    """Return whether a hub repository holds an adapter, as transformers looks for one."""
    from transformers.utils import find_adapter_config_file

    name, commit = repository(location)[0], _commit(location)
    with loading_errors(location):
        return find_adapter_config_file(name, revision=commit) is not None


def fingerprint(location: str) -> str:
    """Return the fingerprint of a base model without hashing every byte.

    For a folder it covers name, size and last megabyte of each file of weights, and the
    configuration; for a hub id the commit.
    """
    folder = Path(location)
    if not folder.is_dir():
        return f"{repository(location)[0]} {_commit(location)}"
    digest = hashlib.sha256()
    weights = [*folder.glob("*.safetensors"), *folder.glob("*.bin")]
    for path in [*sorted(weights), folder / "config.json"]:
        size = path.stat().st_size
        with path.open("rb") as file:
            file.seek(max(0, size - (1 << 20)))
            digest.update(f"{path.name} {size} ".encode() + file.read())
    return f"{folder.name} {digest.hexdigest()[:16]}"


def base_digest(location: str, home: Path) -> str:
    """Return what two machines compare to know that they hold the same base model.

    For a folder it covers all weights, the configuration and the tokenizer; for a hub id
    the commit.

    Args:
        location: What `locate` returned.
        home: The program's folder, which keeps the hashes.

    Raises:
        ModelError: The model cannot be read or reached, or a file that we made has changed.
    """
    if Path(location).is_dir():
        return folder_digest(Path(location), home)
    return fingerprint(location)


def load_tokenizer(location: str) -> "PreTrainedTokenizerBase":
    """Return the model's tokenizer, with a padding token and padding on the right.

    If it has no padding token, the end of text serves: the attention mask marks padding,
    never its id.

    Raises:
        ModelError: It cannot be read or reached, or names no end of text.
    """
    from transformers import AutoTokenizer

    source = _source(location)
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
        in_float32: Load and compute an unquantised base in float32 instead of
            `compute_dtype`.

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
    options = _quantization_config(bits, device)
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
            **{**_source(location), "dtype": compute_dtype(device), **options},
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
                quantization_config=_quantization_config(bits, device),
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


def _quantization_config(bits: int, device: str) -> Any:
    """Return transformers' settings of bitsandbytes."""
    from transformers import BitsAndBytesConfig

    if bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
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
    content: Any = _commit(location)
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
