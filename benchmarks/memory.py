"""Memory of loading a 3B base and of a client's training step, against bounds.

    python benchmarks/memory.py
    python benchmarks/memory.py --layers 2
    python benchmarks/memory.py --device cuda
    python benchmarks/memory.py --loss
    python benchmarks/memory.py --folder FOLDER --settings
    systemd-run --user --scope -p MemoryMax=2867M -p MemorySwapMax=0 \
      python benchmarks/memory.py --one FOLDER both

The last two lines are what a bound on the process is for: write the base, and then, does
one setting run where there is no more memory than that, pages of files included?

The base has OpenLLaMA 3B v2's shape and random weights; it is written to a temporary
folder (6.9 GB), or to the one that is named, one layer at a time. Each setting is a process of its own: the first load,
which quantises to 4 bit, and then, from the cached base, one step of `train_adapter`
(lora r=8 on q and v, batch 1, 512 tokens, every one but the first scored): plain, with
compressed activations, with checkpointing, with quantised embeddings and output head, with
the last two.
Live tensors are all storages that torch operators made or were given and that are
still referenced; the process is VmHWM, which counts pages mapped from files too;
anonymous is the process without those, sampled 50 times a second, and not judged.
On a GPU it is torch.cuda.max_memory_allocated instead, which has not been run so far.

The bounds are those of all 26 layers: with fewer, nothing is judged. Linux only.

A random base says nothing about quality, so `--loss` measures what quantised embeddings and
head do to the built-in model, whose head is made a matrix of its own: the loss on the
validation rows, before any training.
"""

import argparse
import contextlib
import gc
import json
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

HIDDEN, INTERMEDIATE, HEADS, VOCABULARY, LAYERS = 3200, 8640, 32, 32_000, 26
LENGTH = 512
_INDEX = "model.safetensors.index.json"
LIVE_BOUND, PROCESS_BOUND = 2.0, 2.8
# What spares activations (None: load alone), and whether embeddings are quantised.
SETTINGS: dict[str, tuple[dict[str, bool] | None, bool]] = {
    "first load": (None, False),
    "step": ({}, False),
    "compression": ({"activation_compression": True}, False),
    "checkpointing": ({"gradient_checkpointing": True}, False),
    "embeddings": ({}, True),
    "both": ({"gradient_checkpointing": True}, True),
}


class LiveTensors(TorchDispatchMode):
    """Counts the bytes of the storages that are referenced, and the most there were."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        # What is read from a file comes from no operator, and soon goes into one.
        for leaf in tree_leaves((args, kwargs)):
            self.add(leaf)
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            self.add(leaf)
        return result

    def add(self, value: Any) -> None:
        """Count a tensor's storage unless it is counted already."""
        if not issubclass(type(value), torch.Tensor) or value.device.type == "meta":
            return
        storage = value.untyped_storage()
        if storage in self._seen:
            return
        self._seen.add(storage)
        size = storage.nbytes()
        weakref.finalize(storage, self._free, size)
        self.now += size
        self.peak = max(self.peak, self.now)

    def _free(self, size: int) -> None:
        self.now -= size


class AnonymousMemory:
    """Samples the process's memory less pages of files, which the system can reclaim."""

    def __init__(self) -> None:
        self.peak = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> "AnonymousMemory":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._ended.wait(0.02):
            self.peak = max(self.peak, _status("RssAnon"))


def main() -> None:
    """Print each setting's peaks, and whether they are within the bounds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--settings", nargs="*", choices=SETTINGS, default=[*SETTINGS])
    parser.add_argument("--folder", type=Path, help="where the base is, or will be")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--one", nargs=2, metavar=("FOLDER", "SETTING"))
    parser.add_argument("--loss", action="store_true", help="quality, not memory")
    args = parser.parse_args()
    if args.loss:
        tell_losses()
        return
    on_gpu = args.device == "cuda"
    if args.one:
        how = measure_on_gpu if on_gpu else measure
        print(json.dumps(how(Path(args.one[0]), args.one[1])))
        return
    name = torch.cuda.get_device_name() if on_gpu else "CPU"
    print(f"{args.layers} layers; {name}; GiB at peak")
    with contextlib.ExitStack() as stack:
        temporary = tempfile.TemporaryDirectory(prefix="fedllm-memory-")
        folder = args.folder or Path(stack.enter_context(temporary))
        if not (folder / "base" / _INDEX).exists():
            write_base(folder / "base", args.layers)
        failed = 0
        for setting in args.settings:
            command = [sys.executable, __file__, "--device", args.device]
            command += ["--one", str(folder), setting]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
            failed |= done.returncode
            if done.returncode:
                print(f"{setting:20} ended with {done.returncode}", flush=True)
            else:
                tell(setting, json.loads(done.stdout.splitlines()[-1]), args.layers)
    if failed:
        raise SystemExit(1)


def tell(setting: str, peaks: dict[str, float], layers: int) -> None:
    """Print a setting's line."""
    for name, peak in peaks.items():
        bound = PROCESS_BOUND if "process" in name else LIVE_BOUND
        verdict = "PASS" if peak <= bound else "FAIL"
        judged = layers == LAYERS and "anonymous" not in name
        shown = f"bound {bound}: {verdict}" if judged else "not judged"
        print(f"{setting:20} {name:14} {peak:6.2f}  {shown}", flush=True)


def write_base(folder: Path, layers: int) -> None:
    """Write a random base in bfloat16, a shard a layer, its configuration and tokenizer."""
    from safetensors.torch import save_file
    from transformers import LlamaConfig

    LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        vocab_size=VOCABULARY,
        tie_word_embeddings=False,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    ).save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)
    square, wide = (HIDDEN, HIDDEN), (INTERMEDIATE, HIDDEN)
    layer = {
        **{f"self_attn.{name}_proj": square for name in "qkvo"},
        **{"mlp.gate_proj": wide, "mlp.up_proj": wide, "mlp.down_proj": wide[::-1]},
        **{"input_layernorm": (HIDDEN,), "post_attention_layernorm": (HIDDEN,)},
    }
    shards: list[dict[str, tuple[int, ...]]] = [
        {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)},
        {"lm_head.weight": (VOCABULARY, HIDDEN), "model.norm.weight": (HIDDEN,)},
    ]
    for index in range(layers):
        prefix = f"model.layers.{index}."
        shards.append({f"{prefix}{k}.weight": shape for k, shape in layer.items()})
    places, size = {}, 0
    for number, shapes in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        tensors = {name: _random(shape, generator) for name, shape in shapes.items()}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        places.update(dict.fromkeys(tensors, file))
        size += sum(tensor.nbytes for tensor in tensors.values())
    _write_tokenizer(folder)
    index_file = {"metadata": {"total_size": size}, "weight_map": places}
    # Last, since it says that the base is complete.
    (folder / _INDEX).write_text(json.dumps(index_file))


def _write_tokenizer(folder: Path) -> None:
    """Write a tokenizer of at most as many tokens, made from the embedded rows."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    from fedllm.config import DataConfig
    from fedllm.data.rows import load_rows

    made = ByteLevelBPETokenizer()
    rows = load_rows(DataConfig(), None)
    made.train_from_iterator(
        (text for row in rows for text in (row["instruction"], row["response"])),
        vocab_size=VOCABULARY,
        special_tokens=["<s>", "</s>"],
        show_progress=False,
    )
    PreTrainedTokenizerFast(
        tokenizer_object=made._tokenizer, eos_token="</s>", pad_token="</s>"
    ).save_pretrained(folder)


def _random(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    tensor = torch.empty(shape, dtype=torch.bfloat16)
    return tensor.normal_(0, 0.02, generator=generator)


def measure(folder: Path, setting: str) -> dict[str, float]:
    """Return the peaks of a setting in GiB; runs in a process of its own."""
    sparing = SETTINGS[setting][0]
    with LiveTensors() as live, AnonymousMemory() as anonymous:
        base = _load(folder, setting, "cpu")
        # What is mapped from a file came from no operator.
        for value in gc.get_objects():
            if issubclass(type(value), torch.Tensor):
                live.add(value)
        peaks = {"load process": _process_peak()}
        peaks["load live"] = live.peak
        peaks["load anonymous"] = anonymous.peak
        if sparing is not None:
            live.peak = live.now
            anonymous.peak = 0
            _step(folder, base, sparing)
            peaks |= {"step live": live.peak, "step process": _process_peak()}
            peaks["step anonymous"] = anonymous.peak
    return {name: peak / 2**30 for name, peak in peaks.items()}


def measure_on_gpu(folder: Path, setting: str) -> dict[str, float]:
    """As `measure`, of the GPU's memory."""
    sparing = SETTINGS[setting][0]
    base = _load(folder, setting, "cuda")
    peaks = {"load device": torch.cuda.max_memory_allocated()}
    if sparing is not None:
        torch.cuda.reset_peak_memory_stats()
        _step(folder, base, sparing)
        peaks["step device"] = torch.cuda.max_memory_allocated()
    return {name: peak / 2**30 for name, peak in peaks.items()}


def _load(folder: Path, setting: str, device: str) -> Any:
    from fedllm.models.loading import load_base

    location, embeddings = str(folder / "base"), SETTINGS[setting][1]
    return load_base(location, 4, folder / "home", device, embeddings)


def _step(folder: Path, base: Any, sparing: dict[str, bool]) -> None:
    from fedllm.adapters.adapted_model import AdaptedModel
    from fedllm.adapters.peft_model import attach, initial_arrays
    from fedllm.adapters.resolve import adapter_spec
    from fedllm.config import AdapterConfig, TrainConfig
    from fedllm.models.loading import load_tokenizer
    from fedllm.models.location import load_config
    from fedllm.training.sft import train_adapter
    from fedllm.training.task import RoundTask

    location = str(folder / "base")
    settings = AdapterConfig(kind="lora", target_modules="q_proj,v_proj")
    spec = adapter_spec(settings, load_config(location), 0)
    adapted = AdaptedModel(attach(base, spec), load_tokenizer(location), spec)
    ids = torch.randint(
        VOCABULARY, (LENGTH,), generator=torch.Generator().manual_seed(1)
    ).tolist()
    train = TrainConfig(batch_size=1, local_steps=1, **sparing)
    examples = [{"input_ids": ids, "labels": ids}]
    task = RoundTask(initial_arrays(spec), 1.0)
    began = time.monotonic()
    result = train_adapter(adapted, examples, train, task)
    seconds = time.monotonic() - began
    print(f"loss {result.loss:.4f}, {seconds:.1f} s", file=sys.stderr)


def tell_losses() -> None:
    """Print the built-in model's loss without and with quantised embeddings and head."""
    from transformers import AutoModelForCausalLM

    from fedllm.config import DataConfig, RunConfig, fedllm_home
    from fedllm.data.rows import load_public
    from fedllm.data.tokens import tokenize
    from fedllm.evaluation.held_out_loss import held_out
    from fedllm.models.loading import load_base, load_tokenizer
    from fedllm.models.location import locate

    data, location = DataConfig(), locate(RunConfig().model.name, fedllm_home())
    tokenizer = load_tokenizer(location)
    rows = load_public(data, "validation")
    assert rows is not None
    examples = tokenize(rows, tokenizer, data, LENGTH).examples
    with tempfile.TemporaryDirectory(prefix="fedllm-memory-") as name:
        folder = Path(name)
        model = AutoModelForCausalLM.from_pretrained(location, dtype=torch.bfloat16)
        table = model.get_input_embeddings().weight
        model.config.tie_word_embeddings = False
        model.lm_head.weight = torch.nn.Parameter(table.detach().clone())
        model.save_pretrained(folder / "untied")
        for small in (False, True):
            home = folder / "home"
            base = load_base(str(folder / "untied"), 4, home, "cpu", small)
            score = held_out(base, examples, 0)
            bits = "4 and 8 bit" if small else "16 bit"
            print(
                f"embeddings and head in {bits}: loss {score.loss:.4f} on "
                f"{score.num_examples} rows, {score.num_tokens} tokens",
                flush=True,
            )


def _process_peak() -> int:
    """Return this process's peak resident memory in bytes."""
    return _status("VmHWM")


def _status(field: str) -> int:
    """Return what the system says of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    line = next(line for line in lines if line.startswith(field))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    main()
