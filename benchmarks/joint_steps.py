"""What a step of a joint run costs on real SuperNodes, beyond the training itself.

A SuperLink and `--nodes` SuperNodes on loopback, each with rows of its own and a home of its
own, run `--rounds` steps under privacy.unit='record', privacy.noise='joint'. A step's seconds
are the server's (metrics.jsonl); those of the training are the clients' own (their logs). On a
machine with fewer cores than nodes the trainings wait for each other, so a step's share of
them is their sum over the cores.

    python benchmarks/joint_steps.py
"""

import argparse
import contextlib
import json
import os
import re
import statistics
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from tests.helpers.flower_processes import (  # noqa: E402 - from the checkout above
    BIN,
    Deployment,
    free_port,
    running,
    typed,
)

_SUM = re.compile(r"step (\d+): sum of a batch after ([\d.]+) s")
_ROWS = "fedllm/data/wordnet_medical/train-0.jsonl"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--nodes", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--rows", type=int, default=243, help="rows of a node")
    parser.add_argument("--batch", type=int, default=16, help="rows expected in a step")
    parser.add_argument("--skip", type=int, default=2, help="first steps left out")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="fedllm-joint-") as folder:
        steps, training = _run(Path(folder), args)
    later = range(args.skip, len(steps))
    cores = min(os.cpu_count() or 1, args.nodes)
    beyond = [steps[i] - training.get(i + 1, 0.0) / cores for i in later]
    whole = [steps[i] for i in later]
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, {args.nodes} nodes")
    print(f"a step: median {statistics.median(whole):.1f} s of {len(whole)}")
    print(f"beyond the training: median {statistics.median(beyond):.1f} s")
    print(
        f"100 steps: {statistics.mean(beyond) * 100 / 60:.1f} min beyond the training"
    )


def _run(
    folder: Path, args: argparse.Namespace
) -> tuple[list[float], dict[int, float]]:
    """Return each step's seconds, and by step those of all nodes' trainings together."""
    here = Deployment(folder, folder)
    here.env["PYTHONPATH"] = f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    models = Path(os.environ.get("FEDLLM_HOME", Path.home() / ".fedllm")) / "models"
    homes = [folder / f"node-{i}" for i in range(args.nodes)]
    for home in (folder / "fedllm", *homes):
        home.mkdir(mode=0o700)
        (home / "models").symlink_to(models)
    lines = (ROOT / _ROWS).read_text("utf-8").splitlines(keepends=True)
    with here.superlink(), contextlib.ExitStack() as stack:
        for index, home in enumerate(homes):
            rows = folder / f"site-{index}.jsonl"
            own = lines[index * args.rows : (index + 1) * args.rows]
            rows.write_text("".join(own), "utf-8")
            node = [sys.executable, "-m", "fedllm.commands.supernode", "--insecure"]
            node += ["--superlink", f"127.0.0.1:{here.port}"]
            node += ["--port", str(free_port())]
            node += ["--node-config", f'data-path="{rows}" declared-rows={args.rows}']
            log = folder / f"node-{index}.log"
            stack.enter_context(
                running(node, {**here.env, "FEDLLM_HOME": str(home)}, log)
            )
        config = {
            "num-server-rounds": args.rounds,
            "privacy.unit": "record",
            "privacy.noise": "joint",
            "train.batch-size": 1,
            "train.gradient-accumulation": args.batch,
            "train.local-steps": 1,
            "strategy.num-clients": args.nodes,
            "strategy.server-learning-rate": 0.01,
            "strategy.server-learning-rate-min": 0.01,
            "strategy.evaluate-every": args.rounds,
            "output.save-every": args.rounds,
            # No public rows: the server scores nothing.
            "data.name": str(folder / "site-0.jsonl"),
        }
        values = " ".join(f"{k}={json.dumps(v)}" for k, v in config.items())
        command = [str(BIN / "flwr"), "run", str(ROOT), "remote", "--stream"]
        done = typed([*command, "--run-config", values], here.env, 1800)
    try:
        steps = [sum(line["seconds"].values()) for line in here.lines()]
    except OSError:
        steps = []
    if len(steps) <= args.rounds:
        sys.exit(f"the run did not end:\n{done.stdout[-4000:]}{done.stderr[-2000:]}")
    training: dict[int, float] = {}
    for home in homes:
        for log in (home / "logs").glob("client-*.log"):
            for step, seconds in _SUM.findall(log.read_text("utf-8")):
                training[int(step)] = training.get(int(step), 0.0) + float(seconds)
    return steps[1:], training


if __name__ == "__main__":
    main()
