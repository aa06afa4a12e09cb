"""What preferences learn: shares of held-out pairs before and after, without and with privacy.

    python benchmarks/preferences.py --clients 20 --seeds 0

Runs of fedllm's own round loop and clients in this process, as `fedllm compare` makes them,
from configs/dpo.toml on SmolLM2-135M and the embedded pairs: the base, the federation without
privacy and the same at epsilon 8. The two shares are of the public test pairs. `preferred`: the
implicit reward of the chosen answer is the higher one; `likelier`: its log-probability is.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
ARMS = ("base", "federated", "federated-dp")


def main() -> None:
    """Compare the arms, and print a table for docs/results.md."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", type=int, default=20)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--settings", default="", help="more of the run config")
    args = parser.parse_args()
    config = [str(ROOT / "configs" / "dpo.toml"), *args.settings.split()]
    command = [sys.executable, "-m", "fedllm.commands.main", "compare", "--run-config"]
    command += [*config, "--clients", str(args.clients), "--arms", *ARMS]
    command += ["--seed", *map(str, args.seeds), "--out", str(args.out)]
    subprocess.run(command, cwd=ROOT, check=True, stdout=sys.stderr)
    rows = json.loads((args.out / "compare.json").read_text())["rows"]
    print("| arm | seed | epsilon | loss a pair | preferred | likelier | seconds |")
    print("|---|---|---|---|---|---|---|")
    for row in sorted(rows, key=lambda row: (ARMS.index(row["arm"]), row["seed"])):
        is_base = row["arm"] == "base"
        print(
            f"| {row['arm']} | {row['seed']} "
            f"| {'-' if row['epsilon'] is None else format(row['epsilon'], '.2f')} "
            f"| {row['test_loss']:.3f} "
            f"| {'-' if is_base else format(row['pairs_preferred'], '.1%')} "
            f"| {row['pairs_likelier']:.1%} | {row['seconds']:.0f} |"
        )


if __name__ == "__main__":
    main()
