"""Every architecture of the list: our ways through a model give what the library's give.

Tolerances are in tests/helpers/architecture_checks.py, the page of the results is
docs/architectures.md. In 8 and 4 bit, and with training, adapter files and export, a sample is
tried here; `pytest tests/models/test_architectures.py -m "slow or not slow"` tries all.
"""

from collections.abc import Callable
from pathlib import Path

import pytest

from fedllm.adapters.kinds import KINDS
from tests.helpers.architecture_checks import (
    GRADIENT,
    LOSS,
    Trial,
    facts,
    faults,
    save_model,
)
from tests.helpers.architectures import ARCHITECTURES, Architecture

PAGE = Path(__file__).parents[2] / "docs" / "architectures.md"
# A capped head, Conv1D, a mixture of experts, latent attention, a state space.
SAMPLE = {
    ("Gemma 2", 4),
    ("GPT-2", 4),
    ("Mixtral", 4),
    ("DeepSeek V3", 8),
    ("Mamba", 8),
}

Find = Callable[[Architecture], Path]


@pytest.fixture(scope="module")
def find(tmp_path_factory: pytest.TempPathFactory) -> Find:
    """Return the folder of a small model, made once."""
    folders: dict[str, Path] = {}

    def saved(architecture: Architecture) -> Path:
        if architecture.name not in folders:
            folder = tmp_path_factory.mktemp("models") / "model"
            folders[architecture.name] = save_model(architecture, folder)
        return folders[architecture.name]

    return saved


def named(name: str) -> Architecture:
    return next(a for a in ARCHITECTURES if a.name == name)


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda a: a.name)
def test_loss_and_gradients_are_the_model_s_own(find, tmp_path, architecture):
    trial = Trial.load(find(architecture), 0, tmp_path)

    assert trial.loss_error() < LOSS
    assert trial.gradient_error() < GRADIENT
    assert trial.example_error() < GRADIENT
    start = f"| {architecture.name} | `{architecture.model_type}` | "
    assert start + " | ".join(facts(trial)) + " |" in PAGE.read_text("utf-8")


@pytest.mark.parametrize(
    ("architecture", "bits"),
    [
        pytest.param(
            *(a, bits),
            id=f"{a.name}-{bits}",
            marks=[] if (a.name, bits) in SAMPLE else [pytest.mark.slow],
        )
        for a in ARCHITECTURES
        for bits in (0, 8, 4)
    ],
)
def test_training_files_and_export_are_right_in_all_bits(
    find, tmp_path, monkeypatch, architecture, bits
):
    monkeypatch.setenv("FEDLLM_HOME", str(tmp_path))

    assert faults(Trial.load(find(architecture), bits, tmp_path)) == []


@pytest.mark.parametrize("bits", [0, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_sits_on_layers_that_lie_the_other_way_round(
    find, tmp_path, monkeypatch, kind, bits
):
    monkeypatch.setenv("FEDLLM_HOME", str(tmp_path))
    trial = Trial.load(find(named("GPT-2")), bits, tmp_path, kind)

    assert trial.gradient_error() < GRADIENT
    assert trial.example_error() < GRADIENT
    assert trial.reopened_error() < GRADIENT
    assert bits or trial.export_error() < GRADIENT
