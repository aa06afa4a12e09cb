"""From message to first training step on real SuperNodes, a new process per message.

A SuperLink and two SuperNodes on loopback, each with its own data file; one of them is
asked in each round, or both at once. The clients' own logs say how long after the message
was made (the clock is the same machine's) the first step began, and how much of that came
after the client's code had the message. Machines differ, so the seconds that a Python takes
which only imports what a client needs stand beside them.

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

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from tests.slow.flower_processes import (  # noqa: E402
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


def main() -> None:
    args = _parser().parse_args()
    with tempfile.TemporaryDirectory(prefix="fedllm-startup-") as folder:
        found = _run(Path(folder), args)
    # The first message of a node finds a cold page cache, and its model not quantised.
    after, inside = zip(
        *(found if len(found) == 1 else found[args.skip :]), strict=True
    )
    print(
        f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, poll {args.poll:g} s"
    )
    print(f"messages: {len(after)} (the first {args.skip} left out)")
    print(
        f"  with the message in the client's hands: median {statistics.median(inside):.1f} s"
    )
    median = statistics.median(after)
    print(
        f"  message to first step: median {median:.1f} s, worst {max(after):.1f} s, "
        f"bound <= {args.bound:g}: {'PASS' if median <= args.bound else 'FAIL'}"
    )
    print(f"  a Python that imports the libraries and ends: median {_imports():.1f} s")
    sys.exit(0 if median <= args.bound else 1)


def _imports() -> float:
    """Return the seconds that importing Flower and the training libraries takes."""
    program = "import flwr.clientapp, bitsandbytes, datasets, peft; from trl import SFTTrainer"
    seconds = []
    for _ in range(5):
        began = time.monotonic()
        subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)
        seconds.append(time.monotonic() - began)
    return statistics.median(seconds)


def _run(folder: Path, args: argparse.Namespace) -> list[tuple[float, float]]:
    """Return (seconds after the message, seconds with it in hand) of each message."""
    home = folder / "home"
    home.mkdir()
    real = Path(os.environ.get("FEDLLM_HOME", Path.home() / ".fedllm"))
    if (real / "models").is_dir():
        (home / "models").symlink_to(real / "models")
    env = environment(folder / "flwr", home)
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
        for index in range(2):
            rows = folder / f"site-{index}.jsonl"
            source = ROOT / f"fedllm/datasets/wordnet_medical/train-{index}.jsonl"
            shutil.copy(source, rows)
            node = [str(BIN / "flower-supernode"), "--insecure"]
            node += ["--superlink", f"127.0.0.1:{port}", "--port", str(free_port())]
            node += ["--node-config", f'data-path="{rows}"']
            stack.enter_context(running(node, env, folder / f"node-{index}.log"))
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
    found: list[tuple[str, float, float]] = []
    for log in (home / "logs").glob("client-*.log"):
        for line in log.read_text("utf-8").splitlines():
            if match := _LINE.search(line):
                found.append((line[:19], float(match[1]), float(match[2])))
    if not found:
        sys.exit(f"no client trained:\n{done.stdout[-4000:]}{done.stderr[-2000:]}")
    return [(after, inside) for _, after, inside in sorted(found)]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--at-once", type=int, choices=(1, 2), default=1, help="SuperNodes in a round"
    )
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--model", help="model.name")
    parser.add_argument("--batch-size", type=int, help="train.batch-size")
    parser.add_argument("--quantization", type=int, default=4)
    parser.add_argument("--skip", type=int, default=2, help="messages left out")
    parser.add_argument(
        "--poll", type=float, default=0.05, help="FLWR_SUPEREXEC_TASK_POLL_INTERVAL, s"
    )
    parser.add_argument("--bound", type=float, default=8.0, help="seconds")
    return parser


if __name__ == "__main__":
    main()
