"""Turn folders of `fedllm compare` into what the planner knows of each way.

    fedllm compare --run-config configs/private-20.toml --clients 20 --out FOLDER ...
    python benchmarks/ways.py FOLDER "fedllm compare --run-config ..."

Replaces the rows of the same way, clients and epsilon in
fedllm/planning/measured_ways.json; the second argument, the command that made the folder, is
kept with them.
"""

import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

from fedllm.commands.comparison_arms import kind_of, start_of
from fedllm.config import RunConfig
from fedllm.config_parsing import parse_run_config
from fedllm.data.rows import load_rows
from fedllm.planning.measured_ways import (
    ALONE,
    CLIENT,
    JOINT,
    NO_PRIVACY,
    RECORD,
    THEN_PERSONAL,
)

_RESULT = Path(__file__).parents[1] / "fedllm/planning/measured_ways.json"


def way_of(arm: str, config: RunConfig) -> str | None:
    """Return the way of an arm; None for the base and for all rows in one place."""
    if kind_of(arm) in ("base", "centralised"):
        return None
    if kind_of(arm) == "alone":
        return ALONE
    federation = start_of(arm) if kind_of(arm) == "personal" else arm
    if federation == "federated":
        way = NO_PRIVACY
    elif config.is_joint:
        way = JOINT
    else:
        way = RECORD if config.privacy.unit == "record" else CLIENT
    return way + THEN_PERSONAL if kind_of(arm) == "personal" else way


def rows_of(folder: Path, command: str) -> list[dict[str, Any]]:
    """Return the rows of a comparison."""
    setting = json.loads((folder / "setting.json").read_text())
    config = parse_run_config(setting["run_config"])
    clients = setting["num_clients"]
    each = len(load_rows(config.data)) / clients
    losses: dict[str, list[float]] = defaultdict(list)
    epsilons: dict[str, float | None] = {}
    for path in sorted(folder.glob("seed-*/*.json")):
        arm = json.loads(path.read_text())
        way = way_of(arm["arm"], config)
        if way is None:
            continue
        losses[way].append(round(arm["test_loss"], 3))
        private = way.removesuffix(THEN_PERSONAL) not in (ALONE, NO_PRIVACY)
        epsilons[way] = config.privacy.target_epsilon if private else None
    return [
        {
            "way": way,
            "clients": clients,
            "rows": round(each, 1),
            "epsilon": epsilons[way],
            "test_losses": sorted(found),
            "command": command,
        }
        for way, found in losses.items()
    ]


def main() -> None:
    """Add a folder's rows to the planner's."""
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    new = rows_of(Path(sys.argv[1]), sys.argv[2])

    def key(row: dict[str, Any]) -> tuple[Any, ...]:
        return row["way"], row["clients"], row["epsilon"]

    kept = json.loads(_RESULT.read_text()) if _RESULT.exists() else []
    replaced = {key(row) for row in new}
    rows = [row for row in kept if key(row) not in replaced] + new
    rows.sort(key=lambda row: (row["way"], row["clients"], row["epsilon"] or 0.0))
    _RESULT.write_text(json.dumps(rows, indent=2) + "\n")
    for row in new:
        sys.stdout.write(f"{row['way']}: {row['test_losses']}\n")


if __name__ == "__main__":
    main()
