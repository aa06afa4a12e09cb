"""The app with an attacking ClientApp, and the settings of its runs."""

import json
import shutil
from pathlib import Path

from tests.helpers.flower_processes import ROOT
from tests.helpers.rows import write_rows

HERE = Path(__file__).parent
ROUNDS, ATTACKERS, CLIP, TIMEOUT = 5, 6, 0.5, 60.0


def hostile_app(folder: Path) -> Path:
    """fedllm with its ClientApp exchanged for the attacking one."""
    shutil.copytree(
        ROOT / "fedllm", folder / "fedllm", ignore=shutil.ignore_patterns("__pycache__")
    )
    shutil.copy(HERE / "hostile_client.py", folder / "fedllm")
    for name in ("README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    text = (ROOT / "pyproject.toml").read_text()
    ours = 'clientapp = "fedllm.client_app:app"'
    assert ours in text
    theirs = 'clientapp = "fedllm.hostile_client:app"'
    (folder / "pyproject.toml").write_text(text.replace(ours, theirs))
    return folder


def settings(base: Path, folder: Path, **more: object) -> str:
    values = {
        "model.name": str(base),
        "model.quantization": 0,
        "data.name": write_rows(folder / "unused.jsonl", 4),
        "data.public-validation": write_rows(folder / "validation.jsonl", 6, 100),
        "data.public-test": write_rows(folder / "test.jsonl", 6, 200),
        "num-server-rounds": ROUNDS,
        "train.batch-size": 4,
        "train.local-steps": 2,
        "strategy.num-clients": ATTACKERS + 1,
        "strategy.round-timeout": TIMEOUT,
        "strategy.server-learning-rate": 1.0,
        "strategy.server-learning-rate-min": 1.0,
        "privacy.on-destructive-noise": "warn",
        **more,
    }
    return " ".join(f"{key}={json.dumps(value)}" for key, value in values.items())


UNITS = {
    # So little noise that what a reply adds can be seen in the adapters.
    "client": {
        "privacy.target-epsilon": 0.0,
        "privacy.noise-multiplier": 0.001,
        "privacy.clipping-norm": CLIP,
        "privacy.noise-probe": False,
    },
    "none": {"privacy.unit": "none", "privacy.target-epsilon": 0.0},
}
