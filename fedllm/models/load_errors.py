"""Errors and log lines of transformers, torch and the hub while a model loads."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fedllm.atomic_files import is_disk_full
from fedllm.errors import ModelError
from fedllm.models.known import BUILT_IN_MODEL


@contextmanager
def loading_errors(location: str) -> Iterator[None]:
    """Raise whatever stops the loading of a model as one line with its remedy.

    Args:
        location: A folder or a hub id.

    Raises:
        ModelError: Instead of any other exception.
    """
    from torch import OutOfMemoryError

    try:
        # The hub's client logs each retry; our error reports how they ended.
        with errors_only("huggingface_hub.utils._http"):
            yield
    except (MemoryError, OutOfMemoryError) as error:
        raise ModelError(
            f"{location} does not fit into memory: set model.quantization=4, or name a"
            " smaller model"
        ) from error
    except Exception as error:
        raise ModelError(_explanation(location, error)) from error


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """Hide the progress bars of local files: they last seconds and break our log lines."""
    from transformers.utils import logging as library

    shown = library.is_progress_bar_enabled()
    library.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            library.enable_progress_bar()


@contextmanager
def errors_only(name: str) -> Iterator[None]:
    """Drop what the logger `name` logs below errors."""
    noisy = logging.getLogger(name)
    level = noisy.level
    noisy.setLevel(logging.ERROR)
    try:
        yield
    finally:
        noisy.setLevel(level)


def _explanation(location: str, error: Exception) -> str:
    """Return the cause of a failed load and its remedy."""
    from huggingface_hub import errors as hub

    chain: list[BaseException] = [error]
    while cause := chain[-1].__cause__ or chain[-1].__context__:
        chain.append(cause)
    first_line = next(iter(str(error).strip().splitlines()), type(error).__name__)
    if "trust_remote_code" in str(error):
        return (
            f"{location} needs code of its own, which is not run here: name a model"
            " that transformers knows"
        )
    if "safetensors" in first_line and "no file named" in first_line:
        return (
            f"{location} has no weights in safetensors, and other formats may hold code: "
            "convert it with transformers' save_pretrained, where you trust its maker"
        )
    if any(is_disk_full(link) for link in chain):
        return f"no space left for {location}: free some, or move HF_HOME"
    if Path(location).is_dir():
        return f"{location} cannot be loaded: {first_line}"
    if any(isinstance(link, hub.GatedRepoError) for link in chain):
        return (
            f"{location} requires its licence to be accepted: do so on its page, then"
            " run `hf auth login` here"
        )
    if any(isinstance(link, hub.RepositoryNotFoundError) for link in chain):
        return (
            f"the hub has no model {location} (or not for you): check the spelling of"
            " model.name, and run `hf auth login` for a private one"
        )
    if any(_is_unreachable(link) for link in chain):
        return (
            f"the model hub is out of reach and {location} is not in its cache here:"
            " connect, or set model.name to a local folder or to "
            f"{BUILT_IN_MODEL.name}"
        )
    return f"{location} cannot be loaded from the hub: {first_line}"


def _is_unreachable(error: BaseException) -> bool:
    import httpx
    from huggingface_hub import errors as hub

    kinds = (hub.LocalEntryNotFoundError, hub.OfflineModeIsEnabled)
    return isinstance(error, (*kinds, httpx.TransportError, ConnectionError))
