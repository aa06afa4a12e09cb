"""Measure what a private federation of SmolLM2 on wordnet-medical can reach.

With one local SGD step every client starts from the same weights, so all clients share
a pass: gradients of single examples are taken apart in it and added up by client, which
gives what each would have sent (`check` compares with fedllm's own trainer). The base is
the 4-bit model multiplied out, whose gradients are the same. Noise comes from a seeded
generator, so that a table can be made again; a run of fedllm never does that.

    python benchmarks/frontier.py check
    python benchmarks/frontier.py screen --kind ffa-lora --clients 20
    python benchmarks/frontier.py run --kind ffa-lora --clients 20 --epsilon 8 \
        --rounds 5 --clip 0.6 --server-lr 0.6 --seed 0 1 2
    python benchmarks/frontier.py add FOLDER
    python benchmarks/frontier.py table
    python benchmarks/frontier.py publish

`screen` prints the validation loss after round 1 for a grid of steps. `run` appends one
line for each seed and skips those that the file has, so that it may be stopped and typed
again. `add` appends a finished run folder of fedllm, with any number of local steps.
Validation rows (128) choose; the 266 test rows are scored once, at the end.
`publish` writes what the planner knows, fedllm/planning/frontier.json, and the plot in docs/images
from the results file, which lies beside this script.
"""

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedllm.adapters.adapted_model import AdaptedModel
from fedllm.adapters.peft_model import attach, initial_arrays
from fedllm.adapters.resolve import adapter_spec
from fedllm.adapters.spec import AdapterSpec
from fedllm.config import AdapterConfig, DataConfig, TrainConfig, fedllm_home
from fedllm.data.partitions import partition
from fedllm.data.rows import load_public, load_rows
from fedllm.data.tokens import tokenize
from fedllm.evaluation.held_out_loss import held_out
from fedllm.models.answer_loss import answer_losses, collate
from fedllm.models.loading import load_base, load_tokenizer
from fedllm.models.location import load_config, locate
from fedllm.planning.frontier import load_frontier
from fedllm.privacy.accounting import calibrate
from fedllm.privacy.mechanism import Vector
from fedllm.runs.directory import read_json, read_metrics
from fedllm.strategy.server_optimizer import cosine

_DELTA = 1e-5
_RESULTS = Path(__file__).with_suffix(".jsonl")
_TOKENS_PER_BATCH = 1536


class Bench:
    """The base with an adapter, the clients' examples and the public rows."""

    def __init__(self, args: argparse.Namespace, seed: int) -> None:
        home = fedllm_home()
        location = locate("smollm2-135m-instruct", home)
        adapter = AdapterConfig(
            kind=args.kind, rank=args.rank, target_modules=args.target_modules
        )
        self.spec: AdapterSpec = adapter_spec(adapter, load_config(location), seed)
        tokenizer = load_tokenizer(location)
        base = load_base(location, 4, home)
        _multiply_out(base)
        # On a CPU, faster than the fused kernel for sequences of this length.
        base.set_attn_implementation("eager")
        self.model = attach(base, self.spec)
        self.adapted = AdaptedModel(self.model, tokenizer, self.spec)
        data = DataConfig(partition=args.partition)
        rows = load_rows(data)
        self.clients = [
            self._examples(partition(data, rows, index, args.clients, seed))
            for index in range(args.clients)
        ]
        public = load_public(data, "validation").shuffle(seed=42).select(range(128))
        self.validation = self._examples(public)
        self.test = self._examples(load_public(data, "test"))
        self._inputs: dict[str, torch.Tensor] = {}
        self._owner = torch.zeros(0, dtype=torch.long)
        self._sums: dict[str, torch.Tensor] = {}
        self._hook()

    def _examples(self, rows: Any) -> list[dict[str, Any]]:
        return tokenize(rows, self.adapted.tokenizer, DataConfig(), 512).examples

    def updates(self, vector: Vector, batch_size: int, seed: int) -> Vector:
        """Return (clients, d): every client's one SGD step at learning rate 1.

        Args:
            vector: (d,) the global adapter.
            batch_size: Examples of a client's batch, drawn anew each round.
            seed: Of that draw.
        """
        generator = np.random.default_rng(seed)
        drawn = []
        for index, examples in enumerate(self.clients):
            size = min(batch_size, len(examples))
            for row in generator.choice(len(examples), size=size, replace=False):
                drawn.append((index, examples[int(row)]))
        return self.gradients(vector, drawn)

    def gradients(
        self, vector: Vector, drawn: list[tuple[int, dict[str, Any]]]
    ) -> Vector:
        """Return (clients, d): minus the gradient of each client's mean token loss."""
        self.adapted.set(unflatten(self.spec, vector))
        count = len(self.clients)
        tokens = np.zeros(count)
        for owner, example in drawn:
            tokens[owner] += sum(label != -100 for label in example["labels"][1:])
        self._sums = {
            name: torch.zeros((count, *shape))
            for name, shape in self.spec.trained_shapes.items()
        }
        self.model.eval()
        for part in _batches(drawn):
            self._owner = torch.tensor([owner for owner, _ in part])
            inputs = collate(
                [example for _, example in part], self.adapted.pad_token_id
            )
            losses = answer_losses(self.model, **inputs)
            owners = [
                owner
                for owner, example in part
                for label in example["labels"][1:]
                if label != -100
            ]
            weights = torch.tensor(1 / tokens[owners], dtype=losses.dtype)
            (losses * weights).sum().backward()
            self.model.zero_grad(set_to_none=True)
        self._owner = self._owner[:0]
        flat = [-grad.reshape(count, -1).double() for grad in self._sums.values()]
        return torch.cat(flat, dim=1).numpy()

    def loss(self, vector: Vector, examples: Any) -> float:
        self.adapted.set(unflatten(self.spec, vector))
        return held_out(self.model, examples, self.adapted.pad_token_id).loss

    def take_public_subspace(self) -> float:
        """Set A of ffa-lora to the leading directions of the gradient on public rows.

        Returns:
            The mean share of each layer's gradient, squared, that they hold.
        """
        data = DataConfig()
        public = (
            load_public(data, "validation").shuffle(seed=42).select(range(128, 256))
        )
        examples = self._examples(public)
        base = self.model.get_base_model()
        whole: dict[str, Any] = {}
        with contextlib.ExitStack() as stack:
            # Else nothing before the first adapter would have a gradient.
            first = base.get_input_embeddings().register_forward_hook(
                lambda _, __, output: output.requires_grad_()
            )
            stack.callback(first.remove)
            for name in self.spec.modules:
                layer = base.get_submodule(name).base_layer
                hook = layer.register_forward_hook(_summed_gradient(name, whole))
                stack.callback(hook.remove)
            for part in _batches([(0, example) for example in examples]):
                inputs = collate(
                    [example for _, example in part], self.adapted.pad_token_id
                )
                answer_losses(self.model, **inputs).sum().backward()
                self.model.zero_grad(set_to_none=True)
        shares = []
        for name, gradient in whole.items():
            _, values, right = torch.linalg.svd(gradient, full_matrices=False)
            leading = (values[: self.spec.rank] ** 2).sum() / (values**2).sum()
            shares.append(float(leading))
            with torch.no_grad():
                a = base.get_submodule(name).lora_A["default"].weight
                a.copy_(right[: self.spec.rank])
        return float(np.mean(shares))

    def _hook(self) -> None:
        """Take gradients apart by example, at every trained value."""
        base = self.model.get_base_model()
        for name in self.spec.trained_shapes:
            inner = name.removeprefix("base_model.model.").removesuffix(".weight")
            module, side = inner.rsplit(".", 1)
            layer = base.get_submodule(module)
            if side == "ia3_change":
                if self.spec.rescales_input(module):
                    layer.base_layer.register_forward_pre_hook(
                        self._rescaled_input(name, layer)
                    )
                else:
                    layer.base_layer.register_forward_hook(self._keep)
                    layer.register_forward_hook(self._rescaled_output(name))
            elif side == "lora_core":
                linear = layer.lora_B["default"]
                left = linear.parametrizations.weight[0].left
                linear.register_forward_hook(self._linear(name, left))
            else:
                linear = getattr(layer, side)["default"]
                linear.register_forward_hook(self._linear(name, None))

    def _linear(self, name: str, left: Any) -> Any:
        """For y = x W^T the gradient of W is dy^T x; that of a core is left^T of it."""

        def forward(_: Any, inputs: Any, output: Any) -> None:
            given = inputs[0].detach()

            def single(gradient: Any) -> Any:
                whole = torch.einsum("bto,bti->boi", gradient, given).float()
                return whole if left is None else left.T @ whole

            self._watch(name, output, single)

        return forward

    def _keep(self, layer: Any, _: Any, output: Any) -> None:
        layer.kept = output.detach()

    def _rescaled_output(self, name: str) -> Any:
        """For z = l * y the gradient of l is the sum of dz * y over tokens."""

        def forward(layer: Any, _: Any, output: Any) -> None:
            plain = layer.base_layer.kept
            self._watch(name, output, lambda g: (g * plain).sum(1).float())

        return forward

    def _rescaled_input(self, name: str, layer: Any) -> Any:
        """The same for what goes into a layer."""

        def forward(_: Any, inputs: Any) -> None:
            factor = layer.ia3_l["default"].detach().flatten()
            plain = inputs[0].detach() / factor
            self._watch(name, inputs[0], lambda g: (g * plain).sum(1).float())

        return forward

    def _watch(self, name: str, tensor: Any, single: Any) -> None:
        """Add up by client what a tensor's gradient says of each example."""
        if tensor.requires_grad and len(self._owner):

            def backward(gradient: Any) -> None:
                self._sums[name].index_add_(0, self._owner, single(gradient))

            tensor.register_hook(backward)


def _summed_gradient(name: str, whole: dict[str, Any]) -> Any:
    """Make the hook that adds up the gradient of a frozen layer's weight."""

    def forward(_: Any, inputs: Any, output: Any) -> None:
        given = inputs[0].detach().float()

        def backward(gradient: Any) -> None:
            single = torch.einsum("bto,bti->oi", gradient.float(), given)
            whole[name] = whole.get(name, 0) + single

        if output.requires_grad:
            output.register_hook(backward)

    return forward


def screen(args: argparse.Namespace) -> None:
    """Print the loss after round 1 for a grid of steps (server learning rate * C)."""
    seed = args.seed[0]
    bench = Bench(args, seed)
    if args.public_subspace:
        tell(share_of_gradient=bench.take_public_subspace())
    start = flatten(initial_arrays(bench.spec))
    began = time.monotonic()
    updates = bench.updates(start, args.batch_size, seed + 1)
    median = float(np.median(np.linalg.norm(updates, axis=1)))
    z = calibrate(args.epsilon, args.rounds, _DELTA, "all", 1.0)
    noise = np.random.default_rng(seed + 1000).standard_normal(start.size)
    noise *= z / args.clients
    tell(
        d=start.size,
        median_norm=median,
        z=z,
        base=bench.loss(start, bench.validation),
        seconds=time.monotonic() - began,
    )
    for share in args.shares:
        mean = clipped(updates, share * median).mean(0) / (share * median)
        for step in args.steps:
            tell(
                clip_share=share,
                step=step,
                cohesion=float(np.linalg.norm(mean)),
                loss=bench.loss(start + step * (mean + noise), bench.validation),
                without_noise=bench.loss(start + step * mean, bench.validation),
            )


def run(args: argparse.Namespace) -> None:
    """Run a federation for each seed that the file does not have yet."""
    out = Path(args.out)
    done = [setting(row) for row in read(out)]
    for seed in args.seed:
        asked = {k: v for k, v in vars(args).items() if k in _SETTINGS}
        asked["seed"] = seed
        if setting(asked) in done:
            continue
        row = {**asked, **federate(args, seed)}
        with out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        tell(**row)


def federate(args: argparse.Namespace, seed: int) -> dict[str, Any]:
    """Return what one federation came to."""
    bench = Bench(args, seed)
    z = 0.0
    if args.epsilon:
        z = calibrate(args.epsilon, args.rounds, _DELTA, "all", 1.0)
    generator = np.random.default_rng(seed + 1000)
    vector = flatten(initial_arrays(bench.spec))
    momentum = np.zeros_like(vector)
    losses = [bench.loss(vector, bench.validation)]
    before = bench.loss(vector, bench.test)
    began = time.monotonic()
    norms = []
    for server_round in range(1, args.rounds + 1):
        draw = seed * 100_003 + server_round
        updates = bench.updates(vector, args.batch_size, draw)
        norms.append(float(np.median(np.linalg.norm(updates, axis=1))))
        mean = clipped(updates, args.clip).mean(0)
        scale = z * args.clip / args.clients
        mean = mean + scale * generator.standard_normal(vector.size)
        momentum = args.momentum * momentum + mean
        rate = cosine(args.server_lr, args.server_lr_min, server_round, args.rounds)
        vector = vector + rate * momentum
        if server_round % args.evaluate_every == 0 or server_round == args.rounds:
            losses.append(bench.loss(vector, bench.validation))
            sys.stderr.write(f"round {server_round}: {losses[-1]:.3f}\n")
    return {
        "d": int(vector.size),
        "z": z,
        "r": z * float(np.sqrt(vector.size)) / args.clients,
        "median_norms": norms,
        "validation": losses,
        "test_before": before,
        "test_after": bench.loss(vector, bench.test),
        "seconds": time.monotonic() - began,
    }


def check(args: argparse.Namespace) -> None:
    """Compare a shared pass with what fedllm's trainer makes of the same examples."""
    from fedllm.training.sft import train_adapter
    from fedllm.training.task import RoundTask

    for kind in ("ffa-lora", "lora-core", "lora", "ia3"):
        args.kind, args.clients = kind, 600
        bench = Bench(args, 0)
        bench.clients = [examples[:8] for examples in bench.clients[:2]]
        start = initial_arrays(bench.spec)
        shared = bench.updates(flatten(start), 8, 0)
        for index, examples in enumerate(bench.clients):
            config = TrainConfig(batch_size=8, local_steps=1)
            task = RoundTask(start, 1.0)
            trained = train_adapter(bench.adapted, examples, config, task)
            update = flatten(trained.arrays) - flatten(start)
            error = np.linalg.norm(update - shared[index]) / np.linalg.norm(update)
            tell(kind=kind, client=index, relative_error=float(error))


def table(args: argparse.Namespace) -> None:
    """Print a Markdown table: one line a setting, mean and spread over its seeds."""
    groups: dict[Any, list[dict[str, Any]]] = {}
    for row in read(Path(args.out)):
        key = tuple(row[name] for name in _SETTINGS if name != "seed")
        groups.setdefault(key, []).append(row)
    sys.stdout.write(
        "| adapter | d | clients | partition | epsilon | rounds | steps, rate | batch | C "
        "| server lr | R | validation loss | test loss | seeds |\n"
        + "|---" * 14
        + "|\n"
    )
    for rows in sorted(groups.values(), key=lambda g: (g[0]["clients"], order(g[0]))):
        first = rows[0]
        name = f"`{first['kind']}`"
        if first["kind"] != "ia3":
            name += f" r={first['rank']}"
        final = [row["validation"][-1] for row in rows]
        test = [row["test_after"] for row in rows]
        rate = f"{first['server_lr']:g}"
        if first["server_lr_min"] != first["server_lr"]:
            rate += f" to {first['server_lr_min']:g}"
        if first["momentum"]:
            rate += f", momentum {first['momentum']:g}"
        cells = [
            name,
            f"{first['d']:,}",
            first["clients"],
            first["partition"],
            f"{first['epsilon']:g}" if first["epsilon"] else "none",
            first["rounds"],
            f"{first['local_steps']}, {first['local_lr']:g}",
            first["batch_size"],
            f"{first['clip']:g}",
            rate,
            f"{first['r']:.2g}",
            spread(final),
            spread(test),
            len(rows),
        ]
        sys.stdout.write("| " + " | ".join(map(str, cells)) + " |\n")


def add(args: argparse.Namespace) -> None:
    """Append finished run folders of fedllm to the results."""
    for folder in map(Path, args.folders):
        config = read_json(folder / "config.json")["run_config"]
        privacy = read_json(folder / "privacy.json")
        result = read_json(folder / "result.json")
        losses = [
            line["validation_loss"] for line in read_metrics(folder / "metrics.jsonl")
        ]
        row = {
            "kind": config["adapter.kind"],
            "rank": config["adapter.rank"],
            "target_modules": config["adapter.target-modules"],
            "clients": privacy["population_size"],
            "partition": config["data.partition"],
            "batch_size": config["train.batch-size"],
            "local_steps": config["train.local-steps"],
            "local_lr": config["train.learning-rate"],
            "rounds": config["num-server-rounds"],
            "epsilon": privacy["target_epsilon"],
            "clip": privacy["clipping_norm"],
            "server_lr": config["strategy.server-learning-rate"],
            "server_lr_min": config["strategy.server-learning-rate-min"],
            "momentum": 0.0,
            "seed": config["seed"],
            "d": privacy["num_trainable"],
            "z": privacy["noise_multiplier"],
            "r": privacy["noise_to_signal"],
            "validation": [loss for loss in losses if loss is not None],
            "test_before": result["test_loss_before"],
            "test_after": result["test_loss_after"],
            "run": folder.name,
        }
        with Path(args.out).open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        tell(**row)


def publish(args: argparse.Namespace) -> None:
    """Write frontier.json and the plot from the results of rows shared `iid`."""
    root = Path(__file__).parent.parent
    groups: dict[Any, list[dict[str, Any]]] = {}
    for row in read(Path(args.out)):
        if row["partition"] == "iid" and row["momentum"] == 0:
            key = tuple(row[name] for name in _SETTINGS if name != "seed")
            groups.setdefault(key, []).append(row)
    found = [
        {
            "kind": rows[0]["kind"],
            "rank": rows[0]["rank"],
            "num_trainable": rows[0]["d"],
            "clients": rows[0]["clients"],
            "epsilon": rows[0]["epsilon"] or None,
            "rounds": rows[0]["rounds"],
            "noise_multiplier": round(rows[0]["z"], 5),
            "clipping_norm": rows[0]["clip"],
            "server_learning_rate": rows[0]["server_lr"],
            "server_learning_rate_min": rows[0]["server_lr_min"],
            "batch_size": rows[0]["batch_size"],
            "local_steps": rows[0]["local_steps"],
            "learning_rate": rows[0]["local_lr"],
            "test_losses": [round(row["test_after"], 3) for row in rows],
        }
        for rows in groups.values()
    ]
    head = {
        "model": "smollm2-135m-instruct",
        "data": "wordnet-medical",
        "loss_before": args.loss_before,
        "loss_without_privacy": args.loss_without_privacy,
        "settings": _SETTINGS_OF_ALL,
    }
    lines = [f"  {json.dumps(k)}: {json.dumps(v)}," for k, v in head.items()]
    rows = ",\n".join("    " + json.dumps(row) for row in found)
    text = "\n".join(["{", *lines, '  "rows": [', rows, "  ]", "}\n"])
    (root / "fedllm" / "planning" / "frontier.json").write_text(text, "utf-8")
    plot(root / "docs" / "images" / "frontier.svg")


def plot(path: Path) -> None:
    """Draw every private run: test loss over the noise that adds up."""
    from matplotlib.figure import Figure

    frontier = load_frontier()
    figure = Figure(figsize=(7.0, 4.2), layout="constrained")
    axes = figure.subplots()
    marks = {"ffa-lora": "o", "lora-core": "s", "lora": "^", "ia3": "D", "vera": "v"}
    for kind in frontier.kinds:
        rows = [r for r in frontier.rows if r.kind == kind and r.epsilon is not None]
        axes.plot(
            [row.noise_level for row in rows for _ in row.test_losses],
            [loss for row in rows for loss in row.test_losses],
            linestyle="none",
            marker=marks[kind],
            fillstyle="none",
            label=kind,
        )
        for row in rows:
            label = f"N={row.clients}, eps {row.epsilon:g}"
            place = (row.noise_level, row.loss)
            axes.annotate(label, place, (5, 4), textcoords="offset points", fontsize=6)
    for loss, label in (
        (frontier.loss_before, "base"),
        (frontier.loss_without_privacy, "best without privacy"),
    ):
        axes.axhline(loss, color="0.5", linestyle=":")
        axes.annotate(
            label, (0.99, loss), xycoords=("axes fraction", "data"), ha="right"
        )
    axes.set(
        xscale="log",
        xlabel="noise that adds up: z sqrt(rounds) / clients",
        ylabel="test loss, nats a token",
    )
    axes.margins(x=0.16)
    axes.legend()
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, metadata={"Date": None})


def order(row: dict[str, Any]) -> tuple[Any, ...]:
    """Sort: partition, strongest noise last, then adapter."""
    return row["partition"], -(row["epsilon"] or 1e9), row["kind"], row["rounds"]


def spread(values: list[float]) -> str:
    """Write a mean, with the range of more than one value."""
    mean = f"{np.mean(values):.3f}"
    if len(values) == 1:
        return mean
    return f"{mean} ({min(values):.3f} to {max(values):.3f})"


def read(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a results file, none where there is none."""
    if not path.exists():
        return []
    one_step = {"local_steps": 1, "local_lr": 1.0}
    lines = path.read_text("utf-8").splitlines()
    return [{**one_step, **json.loads(line)} for line in lines]


def setting(row: dict[str, Any]) -> tuple[Any, ...]:
    """Return what tells one run from another."""
    return tuple(row[name] for name in _SETTINGS)


_SETTINGS = (
    "kind",
    "rank",
    "target_modules",
    "clients",
    "partition",
    "batch_size",
    "local_steps",
    "local_lr",
    "rounds",
    "epsilon",
    "clip",
    "server_lr",
    "server_lr_min",
    "momentum",
    "seed",
)


# What all rows have in common, by the keys of the run config: the planner expects
# nothing of a run that differs.
_SETTINGS_OF_ALL: dict[str, int | float | str] = {
    "model.quantization": 4,
    "adapter.alpha": 16.0,
    "adapter.dropout": 0.0,
    "adapter.target-modules": "auto",
    "data.partition": "iid",
    "train.gradient-accumulation": 1,
    "train.max-length": 512,
    "train.optimizer": "sgd",
    "train.warmup-steps": 0,
    "train.weight-decay": 0.0,
    "train.max-grad-norm": 0.0,
    "train.proximal-mu": 0.0,
    "strategy.sampling": "all",
    "strategy.aggregator": "mean",
    "strategy.server-optimizer": "none",
}


def flatten(arrays: dict[str, Any]) -> Vector:
    return np.concatenate([np.asarray(a, np.float64).ravel() for a in arrays.values()])


def unflatten(spec: AdapterSpec, vector: Vector) -> dict[str, Any]:
    arrays, start = {}, 0
    for name, shape in spec.trained_shapes.items():
        size = int(np.prod(shape))
        arrays[name] = vector[start : start + size].reshape(shape).astype(np.float32)
        start += size
    return arrays


def clipped(updates: Vector, clip: float) -> Vector:
    norms = np.linalg.norm(updates, axis=1, keepdims=True)
    return updates * np.minimum(1.0, clip / np.maximum(norms, 1e-300))


def tell(**row: Any) -> None:
    sys.stdout.write(json.dumps(row) + "\n")
    sys.stdout.flush()


def _multiply_out(base: Any) -> None:
    """Replace every 4-bit layer by its bfloat16 copy: nothing is dequantised again."""
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit

    for name, module in list(base.named_modules()):
        if isinstance(module, Linear4bit):
            weight = dequantize_4bit(module.weight.data, module.weight.quant_state)
            plain = torch.nn.Linear(1, 1, bias=module.bias is not None)
            plain.weight = torch.nn.Parameter(weight.bfloat16(), requires_grad=False)
            plain.in_features, plain.out_features = module.in_features, len(weight)
            plain.bias = module.bias
            parent, _, last = name.rpartition(".")
            setattr(base.get_submodule(parent), last, plain)


def _batches(
    drawn: list[tuple[int, dict[str, Any]]],
) -> Iterator[list[tuple[int, dict[str, Any]]]]:
    """Yield examples of similar length together."""
    batch: list[tuple[int, dict[str, Any]]] = []
    for pair in sorted(drawn, key=lambda pair: len(pair[1]["input_ids"])):
        if batch and len(pair[1]["input_ids"]) * (len(batch) + 1) > _TOKENS_PER_BATCH:
            yield batch
            batch = []
        batch.append(pair)
    if batch:
        yield batch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "mode", choices=("check", "screen", "run", "add", "table", "publish")
    )
    parser.add_argument("folders", nargs="*", help="run folders, for add")
    parser.add_argument("--kind", default="ffa-lora")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--target-modules", default="auto")
    parser.add_argument("--clients", type=int, default=20)
    parser.add_argument("--partition", default="iid")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--epsilon", type=float, default=8.0, help="0: no noise")
    parser.add_argument("--clip", type=float, default=0.6)
    parser.add_argument("--server-lr", type=float, default=0.6)
    parser.add_argument("--server-lr-min", type=float, default=None)
    parser.add_argument("--momentum", type=float, default=0.0)
    parser.add_argument("--seed", type=int, nargs="+", default=[0])
    parser.add_argument("--evaluate-every", type=int, default=1)
    parser.add_argument("--out", default=str(_RESULTS))
    parser.add_argument("--loss-before", type=float, default=3.756)
    parser.add_argument("--loss-without-privacy", type=float, default=2.662)
    parser.add_argument("--public-subspace", action="store_true")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.3])
    parser.add_argument(
        "--steps", type=float, nargs="+", default=[0.2, 0.4, 0.8, 1.6, 3.2, 6.4]
    )
    args = parser.parse_intermixed_args()
    if args.server_lr_min is None:
        args.server_lr_min = args.server_lr
    modes = {
        "check": check,
        "screen": screen,
        "run": run,
        "add": add,
        "table": table,
        "publish": publish,
    }
    modes[args.mode](args)


if __name__ == "__main__":
    main()
