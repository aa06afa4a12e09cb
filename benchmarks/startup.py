"""From message to first training step on real SuperNodes, a new process per message.

A SuperLink and two SuperNodes on loopback, each with its own data file: Flower's own
`flower-supernode`, and `fedllm.commands.supernode`, whose clients are forked. One of them
is asked in each round, at random, or both at once. The clients' own logs say how long
after the message was made (the clock is the same machine's) the first step began, and how
much of that came after the client's code had the message. Machines differ, so the seconds
that a Python takes which only imports what a client needs stand beside them.

    python benchmarks/startup.py
    python benchmarks/startup.py --poll 1.0      # Flower's own pause between looks
"""

import argparse
import contextlib
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from tests.helpers.flower_processes import (  # noqa: E402 - from the checkout above
    BIN,
    environment,
    free_port,
    running,
    typed,
    wait_for_port,
)

_LINE = re.compile(
    r"first step ([\d.]+) s after the message was made, ([\d.]+) s after it was taken"
)


NODES = {
    "flower-supernode": [str(BIN / "flower-supernode")],
    "fedllm.commands.supernode": [sys.executable, "-m", "fedllm.commands.supernode"],
}


def main() -> None:
    args = _parser().parse_args()
    with tempfile.TemporaryDirectory(prefix="fedllm-startup-") as folder:
        found, shares = _run(Path(folder), args)
    print(
        f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, poll {args.poll:g} s"
    )
    medians = {}
    for name, messages in found.items():
        # The first message of a node finds a cold page cache, and its model not quantised.
        after, inside = zip(*messages[args.skip :], strict=True)
        medians[name] = statistics.median(after)
        print(
            f"{name}: message to first step: median {medians[name]:.1f} s of {len(after)}, "
            f"worst {max(after):.1f} s; {statistics.median(inside):.1f} s of it with the "
            "message in the client's hands"
        )
    plain, forked = medians.values()
    print(f"a Python that imports the libraries and ends: median {_imports():.1f} s")
    print(f"a fork server's share of memory: {max(shares):.0f} MiB")
    print(
        f"forked / plain: {forked / plain:.2f}; forked: {forked:.1f} s, "
        f"bound <= {args.bound:g}: {'PASS' if forked <= args.bound else 'FAIL'}"
    )
    sys.exit(0 if forked <= args.bound else 1)


def _imports() -> float:
    """Return the seconds that importing Flower and the training libraries takes."""
    program = "import flwr.clientapp, bitsandbytes, datasets, peft; from trl import SFTTrainer"
    seconds = []
    for _ in range(5):
        began = time.monotonic()
        subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)
        seconds.append(time.monotonic() - began)
    return statistics.median(seconds)


def _run(
    folder: Path, args: argparse.Namespace
) -> tuple[dict[str, list[tuple[float, float]]], list[float]]:
    """Return each node's messages, and MiB of each fork server.

    Of a message: seconds after it was made, seconds with it in hand.
    """
    homes = {name: folder / name for name in ("server", *NODES)}
    real = Path(os.environ.get("FEDLLM_HOME", Path.home() / ".fedllm")) / "models"
    for home in homes.values():
        home.mkdir()
        real.mkdir(parents=True, exist_ok=True)
        (home / "models").symlink_to(real)
    env = environment(folder / "flwr", homes["server"])
    env["FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION"] = "1"
    env["FLWR_SUPEREXEC_TASK_POLL_INTERVAL"] = str(args.poll)
    env["PYTHONPATH"] = f"{ROOT}{os.pathsep}{env.get('PYTHONPATH', '')}"
    port = free_port()
    (folder / "flwr").mkdir()
    (folder / "flwr" / "config.toml").write_text(
        f'[superlink.remote]\naddress = "127.0.0.1:{port}"\ninsecure = true\n'
    )
    with contextlib.ExitStack() as stack:
        link = [str(BIN / "flower-superlink"), "--insecure", "--port", str(port)]
        link += ["--control-api-address", f"127.0.0.1:{free_port()}"]
        stack.enter_context(running(link, env, folder / "superlink.log"))
        wait_for_port(port)
        for index, (name, node) in enumerate(NODES.items()):
            rows = folder / f"site-{index}.jsonl"
            source = ROOT / f"fedllm/data/wordnet_medical/train-{index}.jsonl"
            shutil.copy(source, rows)
            command = [*node, "--insecure", "--superlink", f"127.0.0.1:{port}"]
            command += ["--port", str(free_port())]
            command += ["--node-config", f'data-path="{rows}"']
            own = {**env, "FEDLLM_HOME": str(homes[name])}
            stack.enter_context(running(command, own, folder / f"{name}.log"))
        config = {
            "num-server-rounds": args.rounds,
            "privacy.unit": "none",
            "privacy.target-epsilon": 0.0,
            "strategy.num-clients": 2,
            "strategy.sampling": "fixed" if args.at_once == 1 else "all",
            "strategy.fraction-train": args.at_once / 2,
            # No public rows: the server scores nothing, which with a 3B base takes minutes.
            "data.name": str(folder / "site-0.jsonl"),
            "model.quantization": args.quantization,
        }
        if args.model:
            config["model.name"] = args.model
        if args.batch_size:
            config["train.batch-size"] = args.batch_size
        values = " ".join(f"{k}={json.dumps(v)}" for k, v in config.items())
        command = [str(BIN / "flwr"), "run", str(ROOT), "remote", "--stream"]
        done = typed([*command, "--run-config", values], env)
        shares = _shares(port)
    found = {name: _messages(homes[name]) for name in NODES}
    if not all(len(messages) > args.skip for messages in found.values()):
        sys.exit(f"too few trained:\n{done.stdout[-4000:]}{done.stderr[-2000:]}")
    return found, shares


def _messages(home: Path) -> list[tuple[float, float]]:
    """Return what the logs of a node's client say of its messages, in order."""
    found = []
    for log in (home / "logs").glob("client-*.log"):
        for line in log.read_text("utf-8").splitlines():
            if match := _LINE.search(line):
                found.append((float(match[1]), float(match[2])))
    return found


def _shares(port: int) -> list[float]:
    """Return MiB of the processes that wait beside this SuperLink's SuperNodes."""
    sizes = []
    for node in psutil.process_iter(["cmdline"]):
        words = node.info["cmdline"] or []
        if f"127.0.0.1:{port}" in words and "--node-config" in words:
            servers = [
                p
                for p in node.children()
                if "fedllm.deployment.fork_server" in p.cmdline()
            ]
            sizes += [p.memory_full_info().pss / 2**20 for p in servers]
    return sizes


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--at-once", type=int, choices=(1, 2), default=1, help="SuperNodes in a round"
    )
    parser.add_argument("--rounds", type=int, default=26)
    parser.add_argument("--model", help="model.name")
    parser.add_argument("--batch-size", type=int, help="train.batch-size")
    parser.add_argument("--quantization", type=int, default=4)
    parser.add_argument(
        "--skip", type=int, default=1, help="first messages of a node left out"
    )
    parser.add_argument(
        "--poll", type=float, default=0.05, help="FLWR_SUPEREXEC_TASK_POLL_INTERVAL, s"
    )
    parser.add_argument("--bound", type=float, default=8.0, help="seconds")
    return parser


if __name__ == "__main__":
    main()
